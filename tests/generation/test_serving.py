from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from llm_at_home.generation.eager import EagerEngine
from llm_at_home.generation.graph import GraphEngine
from llm_at_home.generation.reply import Sampling
from llm_at_home.generation.serving.api import Service, application
from llm_at_home.generation.serving.scheduler import Scheduler
from llm_at_home.generation.serving.text import Detokenizer, Stops
from llm_at_home.generation.static import pages, slots
from llm_at_home.models.chat import prompt_ids

TOKENS, CONTEXT = 20, 200
ASKED = [{"role": "user", "content": "What is the capital of France, and why?"}]


@contextmanager
def served(engine: Any, models: dict[str, str | None] | None = None, **options: Any) -> Iterator[str]:
    """The endpoint on a free port, in this process."""
    import uvicorn

    settings = {"context": CONTEXT, "queue": 8, "api_key": None} | options
    with Scheduler(engine, settings["context"], settings["queue"]) as scheduler:
        service = Service(scheduler, models or {"tiny": None}, settings["api_key"], TOKENS, 0.0)
        server = uvicorn.Server(uvicorn.Config(application(service), port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            until(lambda: server.started)
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def until(done: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def client(address: str, key: str = "-") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60)


def health(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{address}/health") as answer:
        return json.loads(answer.read())


@pytest.fixture(params=["graph", "eager"])
def engine(request: pytest.FixtureRequest, model: Any, tokenizer: Any) -> Any:
    if request.param == "graph":
        return GraphEngine(model, tokenizer, TOKENS, batch_size=3)
    return EagerEngine(model, tokenizer, TOKENS)


def test_the_openai_client_gets_the_engine_s_answer_whole_and_in_pieces(engine: Any, model: Any) -> None:
    prompt = prompt_ids(engine.tokenizer, ASKED)
    expected = EagerEngine(model, engine.tokenizer, TOKENS).reply(prompt, Sampling(TOKENS))
    with served(engine) as address:
        asker = client(address)
        assert [one.id for one in asker.models.list()] == ["tiny"]
        whole = asker.chat.completions.create(model="tiny", messages=ASKED, temperature=0)
        assert whole.choices[0].message.content.strip() == expected.text
        assert whole.choices[0].finish_reason == "length"
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt), TOKENS)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        pieces = list(asker.chat.completions.create(model="tiny", messages=ASKED, temperature=0, **options))
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert text.strip() == expected.text
        assert len(pieces) > 4
        assert pieces[-1].usage.completion_tokens == TOKENS


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("few", [False, True])
def test_many_ask_at_once_and_each_gets_its_own_answer(
    model: Any, tokenizer: Any, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if few:
        for module in (pages, slots):
            monkeypatch.setattr(module, "PAGE", 8)
    engine = GraphEngine(model, tokenizer, TOKENS, batch_size=3, pages=1 if few else None)
    set_back: list[int] = []
    make_room = slots.Slots._make_room
    monkeypatch.setattr(slots.Slots, "_make_room", lambda self: set_back.extend(found := make_room(self)) or found)
    conversations = [[{"role": "user", "content": f"Count from {i} to {i * i}."}] for i in range(8)]
    choose, begun = slots.Slots.choose, []

    def together(self: Any, asked: Any, free: Any) -> list[int]:
        waiting = list(asked)  # until all wait: whether pages run out must not depend on who comes when
        begun.extend(waiting if len(waiting) == len(conversations) else [])
        return choose(self, waiting, free) if begun else []

    monkeypatch.setattr(slots.Slots, "choose", together)
    alone = EagerEngine(model, tokenizer, TOKENS)
    expected = [alone.reply(prompt_ids(tokenizer, one), Sampling(TOKENS)).text for one in conversations]
    assert len(set(expected)) > 4
    longest = max(len(prompt_ids(tokenizer, one)) for one in conversations) + TOKENS
    context = 2 * longest if few else CONTEXT  # the fewest pages are those of one conversation of this length
    with served(engine, context=context) as address, ThreadPoolExecutor(8) as pool:

        def ask(messages: Any) -> str:
            answer = client(address).chat.completions.create(model="tiny", messages=messages, temperature=0)
            return answer.choices[0].message.content.strip()

        assert list(pool.map(ask, conversations)) == expected
        assert health(address) == {"status": "ok", "running": 0, "waiting": 0}
    assert bool(set_back) == few


@pytest.mark.usefixtures("ahead")
def test_who_leaves_is_not_answered_any_more(engine: Any) -> None:
    engine.max_new_tokens = 10_000
    with served(engine, context=20_000) as address:
        asker = client(address)
        service_limit = {"max_tokens": TOKENS}
        stream = asker.chat.completions.create(model="tiny", messages=ASKED, stream=True, extra_body=service_limit)
        next(iter(stream))
        stream.close()
        until(lambda: health(address)["running"] == 0)
        asker.chat.completions.create(model="tiny", messages=ASKED, max_tokens=2)


def test_adapters_are_models_by_name(model: Any, tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = get_peft_model(model, config).eval()
    try:
        tuned.add_adapter("second", config)
        tuned.eval()
        alone, prompt = EagerEngine(tuned, tokenizer, TOKENS), prompt_ids(tokenizer, ASKED)
        expected = {}
        for name, adapter in (("base", None), ("one", "default"), ("two", "second")):
            alone.use_adapter(adapter)
            expected[name] = alone.reply(prompt, Sampling(TOKENS)).text
        assert len(set(expected.values())) == 3
        engine = GraphEngine(tuned, tokenizer, TOKENS, batch_size=2)
        names = ["two", "base", "one", "two", "one", "base"]
        with (
            served(engine, {"base": None, "one": "default", "two": "second"}) as address,
            ThreadPoolExecutor(6) as pool,
        ):

            def ask(name: str) -> str:
                answer = client(address).chat.completions.create(model=name, messages=ASKED, temperature=0)
                return answer.choices[0].message.content.strip()

            assert list(pool.map(ask, names)) == [expected[name] for name in names]
    finally:
        tuned.unload()


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        ({"model": "other"}, 404, "no model other: choose one of tiny"),
        ({"messages": []}, 400, "messages is missing"),
        ({"messages": [{"role": "pirate", "content": "x"}]}, 400, "a role of system"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text as its content"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, 400, "tokens, and prompt and answer together"),
        ({"temperature": 3}, 400, "temperature=3 is no number from 0"),
        ({"max_tokens": True}, 400, "max_tokens=True"),
        ({"top_p": 0.9}, 400, "top_p is not offered"),
        ({"n": 2}, 400, "n is not offered"),
        ({"stop": 7}, 400, "stop is a string"),
    ],
)
def test_what_cannot_be_answered_is_said(model: Any, tokenizer: Any, asked: Any, status: int, said: str) -> None:
    with served(GraphEngine(model, tokenizer, TOKENS)) as address:
        body = json.dumps({"model": "tiny", "messages": ASKED} | asked).encode()
        request = urllib.request.Request(f"{address}/v1/chat/completions", body)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        assert caught.value.code == status
        assert said in json.loads(caught.value.read())["error"]["message"]


def test_a_key_a_queue_and_a_large_body(model: Any, tokenizer: Any) -> None:
    engine = GraphEngine(model, tokenizer, TOKENS)
    with served(engine, api_key="secret", queue=0) as address:
        with pytest.raises(openai.AuthenticationError):
            client(address, "wrong").chat.completions.create(model="tiny", messages=ASKED)
        with pytest.raises(openai.RateLimitError) as caught:
            client(address, "secret").chat.completions.create(model="tiny", messages=ASKED)
        assert caught.value.response.headers["retry-after"] == "2"
        large = [{"role": "user", "content": "x" * 1_100_000}]
        with pytest.raises(openai.APIStatusError, match="larger than"):
            client(address, "secret").chat.completions.create(model="tiny", messages=large)


def test_a_failure_is_told_and_the_next_is_answered(model: Any, tokenizer: Any, monkeypatch: Any) -> None:
    engine = GraphEngine(model, tokenizer, TOKENS, batch_size=2)
    with served(engine) as address:
        asker = client(address)
        whole = asker.chat.completions.create(model="tiny", messages=ASKED, temperature=0).choices[0].message.content
        with monkeypatch.context() as patch:
            patch.setattr(engine._slots, "launch", lambda: 1 / 0)
            with pytest.raises(openai.InternalServerError, match="the model failed"):
                asker.chat.completions.create(model="tiny", messages=ASKED)
        again = asker.chat.completions.create(model="tiny", messages=ASKED, temperature=0)
        assert again.choices[0].message.content == whole


def test_an_answer_ends_before_a_stop_string(engine: Any) -> None:
    with served(engine) as address:
        asker = client(address)
        whole = asker.chat.completions.create(model="tiny", messages=ASKED, temperature=0).choices[0].message.content
        stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
        cut = asker.chat.completions.create(model="tiny", messages=ASKED, temperature=0, stop=[stop])
        assert cut.choices[0].message.content == whole[: whole.find(stop)]
        assert cut.choices[0].finish_reason == "stop"


def test_pieces_are_whole_characters_and_add_up(tokenizer: Any) -> None:
    text = "naïve café — 日本語 🦊 end"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    reader = Detokenizer(tokenizer)
    pieces = [reader.add(token) for token in tokens]
    assert "".join(pieces) + reader.end() == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces


def test_what_may_become_a_stop_string_waits() -> None:
    stops = Stops(["<end>", "##"])
    assert [stops.add(piece) for piece in ("a<", "e", "x#", "b<en", "d>c", "d")] == ["a", "", "<ex", "#b", "", ""]
    assert stops.stopped
    assert stops.end() == ""
    open_end = Stops(["<end>"])
    assert open_end.add("a<en") + open_end.end() == "a<en"
