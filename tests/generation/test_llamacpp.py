"""The llama.cpp engine against transformers on the same float32 weights, through llama.cpp's real server."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_at_home.errors import Refusal
from llm_at_home.generation.chat import Chat
from llm_at_home.generation.llama_server import LocalServer
from llm_at_home.generation.llamacpp import UNKNOWN_TOKEN, FileTokenizer, LlamaCppEngine, _Request, _Stream
from llm_at_home.generation.reply import Sampling
from llm_at_home.metering import memory
from llm_at_home.metering.memory import MemoryMeter
from llm_at_home.models.chat import prompt_ids, template_named
from llm_at_home.models.embedded import gguf_path
from llm_at_home.quantization import gguf_write

TOKENS = 12
QUESTION = [{"role": "user", "content": "Name three colours, please: 👋🏽 1234"}]


@pytest.fixture(scope="module")
def file(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    gguf_write.write(path, model, tokenizer, "F32", "tiny")
    return path


@pytest.fixture(scope="module")
def engine(file: Path, tokenizer: Any) -> Iterator[LlamaCppEngine]:
    made = LlamaCppEngine(file, tokenizer, TOKENS, temperature=0.0, batch_size=3, context=512, threads=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def embedded(tokenizer: Any) -> Iterator[LlamaCppEngine]:
    made = LlamaCppEngine(gguf_path(), tokenizer, TOKENS, context=256, threads=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    texts = ("Hello", "Tell me about the sea and the moon.", "What is a noun? Give me two of them.")
    return [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in texts]


def shortfall(model: Any, prompt: list[int], tokens: list[int]) -> float:
    """How far below the best logit those of the chosen tokens are at most, in standard deviations of the logits.

    Not their equality: llama.cpp keeps keys and values in float16, which can turn a near tie of 49,152 tokens.
    """
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return float(((logits.amax(1) - chosen) / logits.std(1)).max())


def agree(streamed: list[int], whole: list[int]) -> bool:
    """Equal, but for ids that the stream does not name."""
    pairs = list(zip(streamed, whole, strict=True))
    return all(a in (b, UNKNOWN_TOKEN) for a, b in pairs) and sum(a == b for a, b in pairs) > len(pairs) / 2


def test_greedy_is_that_of_transformers_on_the_same_weights(engine, model, prompts) -> None:
    for prompt in prompts:
        reply = engine.reply(prompt, Sampling(TOKENS))
        whole = engine.ask("/completion", engine._body(prompt, Sampling(TOKENS)) | {"stream": False})["tokens"]
        assert agree(reply.tokens, whole)
        assert shortfall(model, prompt, whole) < 0.02
        assert shortfall(model, prompt, whole[1:]) > 1, "another place in the text has another best token"
        assert len(set(reply.tokens)) > 5, "a model that repeats itself would prove little"
        assert (reply.prompt_tokens, reply.finish_reason) == (len(prompt), "length")
        assert len(reply.intervals) == TOKENS - 1
        assert reply.time_to_first_token > 0
        assert all(interval > 0 for interval in reply.intervals)


def test_a_repeated_prompt_is_read_anew(engine, prompts) -> None:
    def reused(**changed: Any) -> int:
        body = engine._body(prompts[2], Sampling(2)) | {"stream": False} | changed
        return engine.ask("/completion", body)["timings"]["cache_n"]

    assert [reused(), reused()] == [0, 0]
    assert reused(cache_prompt=True) > 0, "the server would reuse it if it were allowed to"


def test_sampling_is_reproducible_by_its_seed(engine, prompts) -> None:
    def tokens(seed: int, temperature: float = 1.0) -> list[int]:
        return engine.reply(prompts[0], Sampling(TOKENS, temperature, seed)).tokens

    greedy = engine.reply(prompts[0], Sampling(TOKENS)).tokens
    assert tokens(1) == tokens(1)
    assert len({tuple(tokens(1)), tuple(tokens(2)), tuple(greedy)}) == 3
    assert tokens(3, temperature=1e-4) == greedy
    assert len(tokens(2**32 - 1)) == TOKENS


def test_sampling_is_from_the_whole_distribution_at_the_temperature(engine, model, prompts) -> None:
    with torch.inference_mode():
        logits = model(torch.tensor([prompts[0]])).logits[0, -1].double()
    temperature = float(logits.std())  # near uniform over the vocabulary: a hidden top-k or top-p would show
    expected = torch.softmax(logits / temperature, -1)
    body = engine._body(prompts[0], Sampling(1, temperature)) | {"stream": False}
    drawn = [engine.ask("/completion", body | {"seed": seed})["tokens"][0] for seed in range(120)]
    likely = torch.zeros_like(expected, dtype=torch.bool)
    likely[expected.topk(2000).indices] = True
    share = float(likely[torch.tensor(drawn)].double().mean())
    assert share == pytest.approx(float(expected[likely].sum()), abs=0.18)
    assert 0.1 < float(expected[likely].sum()) < 0.8


def test_an_answer_ends_with_its_end_token_unless_that_is_ignored(engine, model, tokenizer, prompts, tmp_path) -> None:
    """A file whose end token is the third one that the model says."""
    free = engine.reply(prompts[0], Sampling(TOKENS)).tokens
    path = tmp_path / "ends.gguf"
    end = tokenizer.eos_token
    try:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(free[2])
        gguf_write.write(path, model, tokenizer, "F32", "tiny")
    finally:
        tokenizer.eos_token = end
    ending = LlamaCppEngine(path, tokenizer, TOKENS, context=256, threads=1)
    reply = ending.reply(prompts[0], Sampling(TOKENS))
    assert (len(reply.tokens), reply.tokens[-1], reply.finish_reason) == (3, free[2], "stop")
    assert len(reply.intervals) == 2
    endless = ending.reply(prompts[0], Sampling(TOKENS, ignore_eos=True))
    assert (len(endless.tokens), endless.finish_reason) == (TOKENS, "length")
    ending.close()


def test_should_stop_ends_the_answer_and_the_next_one_is_whole(engine, prompts) -> None:
    whole = engine.reply(prompts[0], Sampling(TOKENS)).tokens
    asked = itertools.count(1)
    reply = engine.reply(prompts[0], Sampling(400), should_stop=lambda: next(asked) >= 3)
    assert reply.finish_reason == "stopped"
    assert 3 <= len(reply.tokens) < TOKENS
    assert reply.tokens == whole[: len(reply.tokens)]
    never = engine.reply(prompts[0], Sampling(TOKENS), should_stop=lambda: False)
    assert (never.tokens, never.finish_reason) == (whole, "length")


def test_streamed_pieces_join_to_the_text(engine, prompts) -> None:
    pieces: list[str] = []
    reply = engine.reply(prompts[1], Sampling(TOKENS), on_text=pieces.append)
    assert "".join(pieces).strip() == reply.text
    assert len(pieces) > 3, "text comes while it is made"


@pytest.mark.parametrize(("said", "count", "unknown"), [("a😀b🦄", 9, 0), ("a😀", 3, 2)])
def test_tokens_of_a_character_that_takes_several_are_counted_and_named(
    embedded, prompts, said, count, unknown
) -> None:
    """A grammar makes the model say characters of several tokens; the second time it is cut off within one."""
    engine = embedded
    body = engine._body(prompts[0], Sampling(count)) | {"grammar": f'root ::= "{said}"'}
    whole = engine.ask("/completion", body | {"stream": False})["tokens"]
    stream = _Stream(engine._token_ids)
    with _Request(engine, "/completion", body) as response:
        for i, line in enumerate(line for line in response if line.startswith(b"data: ")):
            stream.add(json.loads(line[6:]), stream._start + 1.0 + i)
    assert len(stream.tokens) == len(whole) == count
    assert stream.tokens.count(UNKNOWN_TOKEN) == unknown
    assert stream.tokens == whole[: count - unknown] + [UNKNOWN_TOKEN] * unknown
    assert stream.first == 1.0
    assert len(stream.intervals) == count - 1
    assert sum(stream.intervals) == pytest.approx(stream._last - stream._start - 1.0)


def test_a_batch_gives_the_single_replies(engine, prompts) -> None:
    single = [engine.reply(prompt, Sampling(TOKENS)) for prompt in prompts]
    together = engine.reply_batch(prompts, Sampling(TOKENS))
    for one, other in zip(single, together, strict=True):
        assert (other.tokens, other.text, other.finish_reason) == (one.tokens, one.text, one.finish_reason)
    assert len({reply.time_to_first_token for reply in together}) == 1
    sampled = engine.reply_batch([prompts[0]] * 2, Sampling(TOKENS, 1.0, seed=5))
    assert sampled[0].tokens != sampled[1].tokens
    assert sampled[0].tokens == engine.reply(prompts[0], Sampling(TOKENS, 1.0, seed=5)).tokens


def test_a_prompt_that_the_context_cannot_hold_is_refused(engine, prompts) -> None:
    with pytest.raises(Refusal, match=r"longer than engine\.context=512"):
        engine.reply(prompts[0] * 40, Sampling(4))


def test_the_server_puts_messages_into_the_template_that_is_chosen(file) -> None:
    with LocalServer(file, context=256, threads=1, chat_template=template_named("guanaco")) as server:
        request = urllib.request.Request(
            server.base_url.removesuffix("/v1") + "/apply-template",
            json.dumps({"messages": QUESTION}).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {server.api_key}"},
        )
        with urllib.request.urlopen(request) as response:
            prompt = json.loads(response.read())["prompt"]
    assert prompt.endswith(f"### Human: {QUESTION[0]['content']}\n### Assistant:")
    with pytest.raises(Refusal, match="chat_template=alpaca is unknown"):
        template_named("alpaca")


def test_a_context_beyond_the_model_s_own_is_the_model_s(file, tokenizer, prompts) -> None:
    engine = LlamaCppEngine(file, tokenizer, TOKENS, context=4096, threads=1)
    try:
        assert engine.context == engine.describe()["context"] == 2048
        with pytest.raises(Refusal, match=r"longer than engine\.context=2048: the model takes no more"):
            engine.reply(prompts[0] * 100, Sampling(4))
    finally:
        engine.close()


def test_the_record_names_the_types_that_the_file_holds(engine) -> None:
    described = engine.describe()
    assert (described["linear"], described["layers"], described["threads"]) == ("F32", {"F32": 14}, 1)
    assert described["other_tensors"] == {"F32": 6}
    assert described["backend"].startswith("llama.cpp (xllamacpp 2")
    assert "CPU" in described["system"]
    assert engine.vocabulary == len(engine.tokenizer)


def test_the_file_s_own_tokenizer_gives_the_prompts_of_transformers(engine, tokenizer) -> None:
    served = FileTokenizer(engine)
    asked = [*QUESTION, {"role": "assistant", "content": "Red, "}, QUESTION[0]]
    for messages in (QUESTION, asked):
        assert prompt_ids(served, messages) == prompt_ids(tokenizer, messages)
    assert served.decode(prompt_ids(tokenizer, QUESTION)) == tokenizer.decode(prompt_ids(tokenizer, QUESTION))


def test_the_terminal_chat_talks_to_it(engine) -> None:
    out = io.StringIO()
    chat = Chat(engine, lines=io.StringIO("Hello\nAnd you?\n/exit\n"), out=out)
    chat.run()
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1]["content"] in out.getvalue()


def test_the_server_s_memory_counts_even_once_it_has_ended(file, tokenizer) -> None:
    def peak(pid: int | str) -> float:
        return int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9

    with MemoryMeter("cpu") as meter:
        others = meter.readings().get("server_resident_set_peak")
        count = len(memory._servers)
        server = LlamaCppEngine(file, tokenizer, 4, context=256, threads=1)
        own, of_server = peak("self"), peak(server.server.pid)
        meter.begin_measured()
        server.close()
        after = meter.readings()
    of_others = others.value if others else 0.0
    assert of_server > file.stat().st_size / 1e9
    assert after["server_resident_set_peak"].value == pytest.approx(of_server + of_others, rel=0.05)
    assert after["resident_set_peak"].value == pytest.approx(own + of_server + of_others, rel=0.05)
    assert after["resident_set_peak"].method == f"sum_of_{count + 2}_kernel_high_water_marks"
    assert 0 < after["measured_server_resident_set_peak"].value <= after["server_resident_set_peak"].value
    MemoryMeter("cpu").close()
    assert len(memory._servers) == count, "what ended before a meter began is none of its business"


def test_a_server_that_dies_is_an_error_that_says_so_and_its_memory_is_unknown(file, tokenizer, prompts) -> None:
    with MemoryMeter("cpu") as meter:
        dying = LlamaCppEngine(file, tokenizer, 400, context=512, threads=1)

        def kill(text: str) -> None:
            os.kill(dying.server.pid, signal.SIGKILL)

        with pytest.raises(RuntimeError, match=r"llama\.cpp's server ended with signal 9"):
            dying.reply(prompts[0], Sampling(400), on_text=kill)
        with pytest.raises(RuntimeError, match="signal 9"):
            dying.reply(prompts[0], Sampling(4))
        assert "ended before" in meter.readings()["resident_set_peak"].reason
        dying.close()


def test_a_gpu_that_this_build_cannot_use_is_refused(file, tokenizer, engine) -> None:
    if engine.server.build["gpus"]:
        pytest.skip("this build of llama.cpp has a GPU")
    with pytest.raises(Refusal, match="use gpu=cpu"):
        LlamaCppEngine(file, tokenizer, 4, context=256, on_gpu=True)


def test_a_command_with_quant_gguf_leaves_a_record_of_what_ran(command: Callable[..., Any], tmp_path) -> None:
    named = f"quant.path={gguf_path()}"
    words = ["quant=gguf", named, "limit=1", "engine.max_new_tokens=3", "engine.threads=1", "engine.context=512"]
    done = command("infer.py", *words, model=False)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "multirun").glob("infer/*/record.json")
    record = json.loads(path.read_text())
    assert record["kernel"]["layers"] == {"Q4_1": 210}
    assert record["config"]["engine"]["name"] == "llamacpp"
    assert record["config"]["model"]["name"] == "SmolLM2-135M-Instruct.Q4_1"
    readings = record["readings"]
    assert readings["bits_per_weight"] | {"n": None} == {
        "value": 5.0,
        "unit": "bits",
        "method": "tensors_on_disk",
        "interval95": None,
        "n": None,
        "reason": None,
    }
    assert readings["server_resident_set_peak"]["value"] > readings["model_size"]["value"]
    assert readings["decode_tokens_per_second"]["value"] > 0
    assert record["counts"]["generated_tokens"] == 6
