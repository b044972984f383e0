from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llm_at_home.generation.eager import EagerEngine
from llm_at_home.generation.graph import GraphEngine
from llm_at_home.generation.reply import OTHER_TEMPERATURE, PUBLISHED_TEMPERATURES, Sampling, temperature_for
from llm_at_home.models.chat import end_of_turn, prompt_ids

TOKENS = 24


@pytest.fixture
def engine(model: Any, tokenizer: Any) -> Iterator[EagerEngine]:
    eos = model.generation_config.eos_token_id
    yield EagerEngine(model, tokenizer, max_new_tokens=TOKENS)
    model.generation_config.eos_token_id = eos


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    texts = ("Hi", "What is the capital of France, and why?", "Count to ten. " * 6)
    return [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in texts]


def plain_greedy(model: Any, prompt: list[int], n: int) -> list[int]:
    """Full forward passes without a cache: the slow way that cannot be wrong."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def end_at(engine: EagerEngine, token: int) -> None:
    engine.model.generation_config.eos_token_id = [token, engine.tokenizer.eos_token_id]


def test_greedy_is_the_argmax_of_full_forward_passes(engine, prompts) -> None:
    for prompt in prompts:
        reply = engine.reply(prompt, Sampling(TOKENS))
        assert reply.tokens == plain_greedy(engine.model, prompt, TOKENS)
        assert len(set(reply.tokens)) > 5, "a model that repeats itself would prove little"
        assert reply.text == engine.tokenizer.decode(reply.tokens, skip_special_tokens=True).strip()
        assert (reply.prompt_tokens, reply.finish_reason) == (len(prompt), "length")


def test_a_model_that_likes_to_sample_is_still_greedy_when_asked(engine, prompts) -> None:
    """Llama-2-chat's own generation configuration samples; what is asked for counts."""
    own = engine.model.generation_config
    before = own.to_dict()
    own.update(do_sample=True, temperature=5.0, top_p=0.9, top_k=3, repetition_penalty=0.01)
    try:
        assert engine.reply(prompts[0], Sampling(TOKENS)).tokens == plain_greedy(engine.model, prompts[0], TOKENS)
    finally:
        own.update(**before)


def test_there_is_one_interval_fewer_than_tokens(engine, prompts) -> None:
    for n in (1, 2, TOKENS):
        reply = engine.reply(prompts[0], Sampling(n))
        assert len(reply.tokens) == n
        assert len(reply.intervals) == n - 1
        assert reply.time_to_first_token > 0
        assert all(interval > 0 for interval in reply.intervals)


def test_times_are_those_of_the_models_forward_passes(engine, prompts, monkeypatch) -> None:
    import time

    forward = type(engine.model).forward
    delays = iter([0.2, 0.05, 0.1, 0.05])

    def slow(self, *arguments, **options):
        time.sleep(next(delays))
        return forward(self, *arguments, **options)

    monkeypatch.setattr(type(engine.model), "forward", slow)
    reply = engine.reply(prompts[0], Sampling(4))
    assert reply.time_to_first_token >= 0.2
    for interval, delay in zip(reply.intervals, (0.05, 0.1, 0.05), strict=True):
        assert interval >= delay
    assert reply.intervals[1] == max(reply.intervals) or max(reply.intervals) > 0.15  # a busy machine may stall


def test_a_batch_is_timed_by_its_decode_steps(engine, prompts, monkeypatch) -> None:
    import time

    forward = type(engine.model).forward
    delays = iter([0.2, 0.05, 0.1])

    def slow(self, *arguments, **options):
        time.sleep(next(delays))
        return forward(self, *arguments, **options)

    monkeypatch.setattr(type(engine.model), "forward", slow)
    replies = engine.reply_batch(prompts, Sampling(3))
    assert [reply.time_to_first_token >= 0.2 for reply in replies] == [True] * 3
    for reply in replies:
        assert reply.intervals[0] >= 0.05
        assert reply.intervals[1] >= 0.1


def test_a_batch_padded_on_the_left_gives_the_single_replies(engine, prompts) -> None:
    single = [engine.reply(prompt, Sampling(TOKENS)) for prompt in prompts]
    together = engine.reply_batch(prompts, Sampling(TOKENS))
    assert len({len(prompt) for prompt in prompts}) == 3
    for one, other in zip(single, together, strict=True):
        assert (other.text, other.tokens, other.prompt_tokens) == (one.text, one.tokens, one.prompt_tokens)
        assert other.finish_reason == one.finish_reason
        assert other.time_to_first_token == together[0].time_to_first_token > 0
        assert other.intervals == together[0].intervals
        assert len(other.intervals) == TOKENS - 1


def test_an_answer_ends_with_its_first_end_token_alone_and_in_a_batch(engine, prompts) -> None:
    free = [engine.reply(prompt, Sampling(TOKENS)).tokens for prompt in prompts]
    end = free[1][7]
    first = free[1].index(end)
    end_at(engine, end)
    single = [engine.reply(prompt, Sampling(TOKENS)) for prompt in prompts]
    together = engine.reply_batch(prompts, Sampling(TOKENS))
    for one, other, before in zip(single, together, free, strict=True):
        expected = before[: before.index(end) + 1] if end in before else before
        assert one.tokens == other.tokens == expected
        assert one.finish_reason == other.finish_reason == ("stop" if end in before else "length")
        assert len(other.intervals) == len(other.tokens) - 1
    longest = max(together, key=lambda reply: len(reply.tokens))
    assert all(reply.intervals == longest.intervals[: len(reply.intervals)] for reply in together)
    assert single[1].finish_reason == "stop"
    assert len(single[1].tokens) == first + 1


@pytest.mark.parametrize("kind", [EagerEngine, GraphEngine])
def test_an_answer_ends_with_the_turn_where_the_model_s_own_end_is_another_token(
    model, tokenizer, prompts, kind, monkeypatch
) -> None:
    """As of a base model that was fine-tuned with a chat template."""
    tokens = plain_greedy(model, prompts[1], TOKENS)
    other = copy.deepcopy(tokenizer)
    last = tokens[5]
    mark = tokenizer.convert_ids_to_tokens(last)
    assert tokens.index(last) == 5
    other.add_special_tokens({"additional_special_tokens": [mark]})
    other.chat_template = tokenizer.chat_template.replace("<|im_end|>", mark)
    assert end_of_turn(other) == last
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    monkeypatch.setattr(model.generation_config, "eos_token_id", tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    reply = kind(model, other, max_new_tokens=TOKENS).reply(prompts[1], Sampling(TOKENS))
    assert (reply.tokens, reply.finish_reason) == (tokens[:6], "stop")


def test_ignore_eos_makes_every_token_that_was_asked_for(engine, prompts) -> None:
    end_at(engine, engine.reply(prompts[1], Sampling(TOKENS)).tokens[2])
    assert len(engine.reply(prompts[1], Sampling(TOKENS)).tokens) <= 3
    reply = engine.reply(prompts[1], Sampling(TOKENS, ignore_eos=True))
    assert len(reply.tokens) == TOKENS
    assert reply.finish_reason == "length"
    assert [len(r.tokens) for r in engine.reply_batch(prompts, Sampling(TOKENS, ignore_eos=True))] == [TOKENS] * 3


def test_should_stop_ends_the_answer_after_the_token_at_hand(engine, prompts) -> None:
    whole = engine.reply(prompts[0], Sampling(TOKENS)).tokens
    asked = itertools.count(1)
    reply = engine.reply(prompts[0], Sampling(TOKENS), should_stop=lambda: next(asked) >= 5)
    assert reply.tokens == whole[:5]
    assert reply.finish_reason == "stopped"
    never = engine.reply(prompts[0], Sampling(TOKENS), should_stop=lambda: False)
    assert (never.tokens, never.finish_reason) == (whole, "length")


def test_sampling_is_reproducible_by_its_seed(engine, prompts) -> None:
    def tokens(seed: int, temperature: float = 1.0) -> list[int]:
        torch.rand(7)  # whatever happened before must not matter
        return engine.reply(prompts[0], Sampling(TOKENS, temperature, seed)).tokens

    greedy = engine.reply(prompts[0], Sampling(TOKENS)).tokens
    assert tokens(1) == tokens(1)
    assert len({tuple(tokens(1)), tuple(tokens(2)), tuple(greedy)}) == 3
    assert tokens(3, temperature=1e-4) == greedy
    assert tokens(4, temperature=1e-42) == greedy
    assert tokens(5, temperature=1e-300) == greedy


def test_sampling_follows_the_models_probabilities_at_the_temperature(engine, prompts) -> None:
    with torch.inference_mode():
        logits = engine.model(torch.tensor([prompts[0]])).logits[0, -1].double()
    temperature = float(logits.std())  # near uniform over the vocabulary: a hidden top-k or top-p would show
    expected = torch.softmax(logits / temperature, -1)
    own = engine.model.generation_config
    own.min_p = 0.5  # as some models' own configuration has it
    try:
        replies = engine.reply_batch([prompts[0]] * 300, Sampling(1, temperature, seed=0))
    finally:
        own.min_p = None
    drawn = torch.tensor([reply.tokens[0] for reply in replies])
    likely = torch.zeros_like(expected, dtype=torch.bool)
    likely[expected.topk(2000).indices] = True
    share = float(likely[drawn].double().mean())
    assert share == pytest.approx(float(expected[likely].sum()), abs=0.12)
    assert 0.1 < float(expected[likely].sum()) < 0.9


def test_streamed_pieces_join_to_the_text(engine, prompts) -> None:
    for prompt, seed in itertools.product(prompts, range(6)):
        pieces: list[str] = []
        sampling = Sampling(TOKENS, 2.0 if seed else 0.0, seed)
        reply = engine.reply(prompt, sampling, on_text=pieces.append)
        assert "".join(pieces).strip() == reply.text
        assert len([piece for piece in pieces if piece]) > 3, "text comes while it is made"
        assert len(reply.intervals) == TOKENS - 1
        assert engine.reply(prompt, sampling).tokens == reply.tokens


def test_a_model_without_a_tokenizer_is_timed_all_the_same(model) -> None:
    reply = EagerEngine(model, None, max_new_tokens=4).reply([5, 6, 7], Sampling(4, ignore_eos=True))
    assert (len(reply.tokens), len(reply.intervals), reply.text) == (4, 3, "")


def test_temperatures_are_the_published_ones_unless_one_is_chosen() -> None:
    assert temperature_for("writing", None) == 0.7
    assert temperature_for("math", None) == 0.0
    assert temperature_for("stem", None) == 0.1
    assert temperature_for("another", None) == OTHER_TEMPERATURE
    assert temperature_for("writing", 0.0) == 0.0
    assert len(PUBLISHED_TEMPERATURES) == 8
