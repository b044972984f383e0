from __future__ import annotations

import json
import socket
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
from llm_at_home.generation.serving.api import Service
from llm_at_home.generation.serving.scheduler import Busy, Request, Scheduler
from llm_at_home.generation.serving.server import Server
from llm_at_home.generation.serving.text import Detokenizer, Stops
from llm_at_home.generation.static import pages, slots
from llm_at_home.models.chat import prompt_ids

TOKENS, CONTEXT = 20, 200
FOREVER = {"context": 20_000, "max_new_tokens": 10_000}  # tokens that no test waits for
ASKED = [{"role": "user", "content": "What is the capital of France, and why?"}]


@contextmanager
def served(engine: Any, models: dict[str, str | None] | None = None, **options: Any) -> Iterator[str]:
    """The endpoint on a free port, in this process."""
    settings = {"context": CONTEXT, "queue": 8, "api_key": None, "max_new_tokens": TOKENS} | options
    with Scheduler(engine, settings["context"], settings["queue"]) as scheduler:
        service = Service(scheduler, models or {"tiny": None}, settings["api_key"], settings["max_new_tokens"], 0.0)
        server = Server(service, "127.0.0.1", 0)
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


def raw(address: str, body: dict[str, Any], sent: int | None = None) -> socket.socket:
    """A connection on which a request, or its first bytes, has been sent."""
    host, port = address.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(head.encode() + content[:sent])
    return connection


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_not_answered_any_more(engine: Any, stream: bool) -> None:
    with served(engine, **FOREVER) as address:
        connection = raw(address, {"model": "tiny", "messages": ASKED, "stream": stream})
        until(lambda: health(address)["running"] == 1)
        connection.close()
        until(lambda: health(address)["running"] == 0, 5)
        client(address).chat.completions.create(model="tiny", messages=ASKED, max_tokens=2)


def test_who_leaves_while_sending_is_no_error_of_the_server(
    model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(GraphEngine(model, tokenizer, TOKENS)) as address:
        raw(address, {"model": "tiny", "messages": ASKED}, sent=20).close()
        client(address).chat.completions.create(model="tiny", messages=ASKED, max_tokens=2)
    assert "Traceback" not in capsys.readouterr().err


def test_the_end_of_the_server_breaks_off_what_it_answers(engine: Any) -> None:
    broken: list[Exception] = []

    def ask(stream: bool) -> None:
        try:
            answer = client(address).chat.completions.create(model="tiny", messages=ASKED, stream=stream)
            list(answer)
        except openai.APIError as error:
            broken.append(error)

    with served(engine, **FOREVER) as address:
        askers = [threading.Thread(target=ask, args=[stream]) for stream in (True, False)]
        for asker in askers:
            asker.start()
        until(lambda: sum(health(address)[key] for key in ("running", "waiting")) == 2)
        start = time.monotonic()
    assert time.monotonic() - start < 5
    for asker in askers:
        asker.join()
    assert [str(error) for error in broken if "the server is being ended" not in str(error)] == []
    assert len(broken) == 2


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
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "text as its content"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, 400, "prompt and answer together may have 200"),
        ({"temperature": 3}, 400, "temperature=3 is no number from 0"),
        ({"max_tokens": True}, 400, "max_tokens=True"),
        ({"max_tokens": 1.5}, 400, "max_tokens=1.5 is no whole number from 1 on"),
        ({"seed": 1.5}, 400, "seed=1.5 is no whole number from 0 on"),
        ({"top_p": 0.9}, 400, "top_p is not offered"),
        ({"n": 2}, 400, "n is not offered"),
        ({"stop": 7}, 400, "stop is a string"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format is not offered"),
        ({"logit_bias": {"5": -100}}, 400, "logit_bias is not offered"),
        ({"tool_choice": "required"}, 400, "tool_choice is not offered"),
        ({"top_k": 1}, 400, "top_k is not offered"),
        ({"max_token": 5}, 400, "max_token is not offered"),
        ({"model": ["tiny"]}, 400, "model is no name: choose one of tiny"),
        ({"model": "\ud800"}, 404, "no model ?: choose one of tiny"),
        ({"stream": "false"}, 400, "stream is true or false"),
        ({"stream_options": 5}, 400, "stream_options is an object"),
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


def test_what_asks_for_nothing_is_taken(model: Any, tokenizer: Any) -> None:
    nothing: dict[str, Any] = {
        **{"n": 1, "top_p": 1.0, "presence_penalty": 0, "logprobs": False, "logit_bias": {}, "tools": []},
        **{"response_format": {"type": "text"}, "tool_choice": "none", "user": "me", "metadata": {"a": "b"}},
        "extra_body": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "reasoning_effort": None},
    }
    with served(GraphEngine(model, tokenizer, TOKENS)) as address:
        create = client(address).chat.completions.create
        plain, same = (create(model="tiny", messages=ASKED, **more) for more in ({}, nothing))
    assert same.choices[0].message.content == plain.choices[0].message.content


def test_a_conversation_may_fill_the_context_and_no_more(model: Any, tokenizer: Any) -> None:
    prompt = len(prompt_ids(tokenizer, ASKED))
    engine = GraphEngine(model, tokenizer, TOKENS, batch_size=2)
    with served(engine, context=prompt + 7) as address:
        answer = client(address).chat.completions.create(model="tiny", messages=ASKED)
        assert (answer.usage.total_tokens, answer.choices[0].finish_reason) == (prompt + 7, "length")
    with served(engine, context=prompt) as address, pytest.raises(openai.BadRequestError) as caught:
        client(address).chat.completions.create(model="tiny", messages=ASKED)
    assert caught.value.code == "context_length_exceeded"


def test_a_model_is_looked_up_and_other_paths_say_what_there_is(model: Any, tokenizer: Any) -> None:
    with served(GraphEngine(model, tokenizer, TOKENS), {"home/tiny": None}) as address:
        asker = client(address)
        assert asker.models.retrieve("home/tiny").id == "home/tiny"
        with pytest.raises(openai.NotFoundError, match="there is no model large") as caught:
            asker.models.retrieve("large")
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError, match="there is POST /v1/chat/completions"):
            asker.completions.create(model="home/tiny", prompt="x")


def test_a_key_and_a_large_body(model: Any, tokenizer: Any) -> None:
    engine = GraphEngine(model, tokenizer, TOKENS)
    with served(engine, api_key="secret") as address:
        with pytest.raises(openai.AuthenticationError):
            client(address, "wrong").chat.completions.create(model="tiny", messages=ASKED)
        large = [{"role": "user", "content": "x" * 1_100_000}]
        with pytest.raises(openai.APIStatusError, match="larger than"):
            client(address, "secret").chat.completions.create(model="tiny", messages=large)


def test_only_so_many_wait(engine: Any) -> None:
    with served(engine, queue=1, **FOREVER) as address:
        places = getattr(engine, "batch_size", 1)
        askers = [raw(address, {"model": "tiny", "messages": ASKED, "stream": True}) for _ in range(places + 1)]
        until(lambda: health(address) == {"status": "ok", "running": places, "waiting": 1})
        with pytest.raises(openai.RateLimitError) as caught:
            client(address).chat.completions.create(model="tiny", messages=ASKED)
        assert caught.value.response.headers["retry-after"] == "2"
        for asker in askers:
            asker.close()


def test_places_that_are_free_and_who_has_left_take_no_place_in_the_queue(model: Any, tokenizer: Any) -> None:
    ended: list[str] = []

    def request() -> Request:
        return Request([1, 2, 3], Sampling(2), None, lambda text: None, lambda reason, count: ended.append(reason))

    scheduler = Scheduler(GraphEngine(model, tokenizer, TOKENS, batch_size=2), CONTEXT, queue=1)
    asked = [request() for _ in range(3)]  # at once, before the thread could begin with any
    for one in asked:
        scheduler.submit(one)
    with pytest.raises(Busy):
        scheduler.submit(request())
    asked[2].cancelled.set()
    assert scheduler.load == (0, 2)
    scheduler.submit(request())
    with scheduler:
        until(lambda: len(ended) == 4)
    assert sorted(ended) == ["cancelled", "length", "length", "length"]


@pytest.mark.parametrize("where", ["launch", "places"])
def test_a_failure_is_told_and_the_next_is_answered(
    model: Any, tokenizer: Any, where: str, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine = GraphEngine(model, tokenizer, TOKENS, batch_size=2)
    with served(engine) as address:
        asker = client(address)
        whole = asker.chat.completions.create(model="tiny", messages=ASKED, temperature=0).choices[0].message.content
        with monkeypatch.context() as patch:
            patch.setattr(engine if where == "places" else engine._slots, where, lambda *_: 1 / 0)
            with pytest.raises(openai.InternalServerError, match="the model failed"):
                asker.chat.completions.create(model="tiny", messages=ASKED)
        again = asker.chat.completions.create(model="tiny", messages=ASKED, temperature=0)
        assert again.choices[0].message.content == whole
    assert "ZeroDivisionError" in caplog.text


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
