from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from llm_at_home.generation.eager import EagerEngine
from llm_at_home.generation.graph import GraphEngine
from llm_at_home.generation.reply import Sampling
from llm_at_home.generation.static import pages, slots
from llm_at_home.generation.static.asked import Asked
from llm_at_home.generation.static.layers import Unsupported, decoder_of, uncapturable
from llm_at_home.generation.static.pages import PAGE, Pages
from llm_at_home.generation.static.slots import Slots
from llm_at_home.generation.static.step import Step
from llm_at_home.models.chat import prompt_ids

TOKENS = 24


@pytest.fixture
def graph(model: Any, tokenizer: Any) -> GraphEngine:
    return GraphEngine(model, tokenizer, TOKENS)


@pytest.fixture
def short_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 8 tokens, of which the tests' short sequences have many."""
    for module in (pages, slots):
        monkeypatch.setattr(module, "PAGE", 8)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    texts = ("Hi", "What is the capital of France, and why?", "Count to ten. " * 6, "And now?")
    return [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in texts]


def eager_tokens(model: Any, tokenizer: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    engine = EagerEngine(model, tokenizer, TOKENS)
    return [engine.reply(prompt, Sampling(TOKENS, **options)).tokens for prompt in prompts]


def test_greedy_tokens_are_the_eager_engines(
    graph: GraphEngine, model: Any, tokenizer: Any, prompts: list[list[int]]
) -> None:
    expected = eager_tokens(model, tokenizer, prompts)
    assert len({tuple(tokens) for tokens in expected}) == len(prompts)
    assert [graph.reply(prompt, Sampling(TOKENS)).tokens for prompt in prompts] == expected


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_finished_answers_place_is_filled_and_nothing_changes(
    graph: GraphEngine, model: Any, tokenizer: Any, prompts: list[list[int]], count: int
) -> None:
    expected = eager_tokens(model, tokenizer, prompts)
    lengths = [5, TOKENS, 1, 9]
    requests = [(i, (prompt, Sampling(n))) for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True))]
    found = dict(graph.stream(requests, count))
    assert [found[i].tokens for i in range(4)] == [tokens[:n] for tokens, n in zip(expected, lengths, strict=True)]
    assert [found[i].prompt_tokens for i in range(4)] == [len(prompt) for prompt in prompts]


@pytest.mark.usefixtures("ahead")
def test_an_answer_may_be_followed_by_another(graph: GraphEngine, model: Any, prompts: list[list[int]]) -> None:
    def then(key: Any, reply: Any) -> Any:
        if isinstance(key, tuple):
            return None
        return (key, "second"), ([*prompts[key], *reply.tokens, *prompts[0]], Sampling(3))

    requests = [(i, (prompt, Sampling(4))) for i, prompt in enumerate(prompts)]
    found = dict(graph.stream(requests, 2, longest=200, then=then))
    assert len(found) == 8
    longer = [*prompts[1], *found[1].tokens, *prompts[0]]
    assert found[1, "second"].tokens == EagerEngine(model, None, 3).reply(longer, Sampling(3)).tokens
    # Each follow-up found the place of its own conversation: all but the last answered token had been read there.
    assert [found[i, "second"].reused_tokens for i in range(4)] == [len(prompt) + 3 for prompt in prompts]
    assert [found[i].reused_tokens for i in range(2)] == [0, 0]


def test_a_conversation_goes_on_where_it_stopped(
    graph: GraphEngine, model: Any, tokenizer: Any, prompts: list[list[int]]
) -> None:
    first = graph.reply(prompts[1], Sampling(6))
    longer = [*prompts[1], *first.tokens, *prompts[3]]
    (expected,) = eager_tokens(model, tokenizer, [longer])
    again = graph.reply(longer, Sampling(TOKENS))
    assert again.tokens == expected
    assert again.reused_tokens == len(prompts[1]) + 5
    changed = [*longer[:10], longer[10] + 1, *longer[11:]]
    (expected,) = eager_tokens(model, tokenizer, [changed])
    assert graph.reply(changed, Sampling(TOKENS)).reused_tokens == 10
    assert graph.reply(changed, Sampling(TOKENS)).tokens == expected
    graph.forget()
    assert graph.reply(changed, Sampling(TOKENS)).reused_tokens == 0


def test_long_prompts_are_read_in_parts(
    graph: GraphEngine, model: Any, tokenizer: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "PROMPT_PART", 7)
    (expected,) = eager_tokens(model, tokenizer, [prompts[2]])
    assert graph.reply(prompts[2], Sampling(TOKENS)).tokens == expected


@pytest.mark.parametrize(("bound", "expected"), [(4096, 1), (100, 2)])
def test_prompts_read_together_are_read_as_alone(
    graph: GraphEngine, prompts: list[list[int]], bound: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "PROMPT_PART", bound)
    kept = graph.reply(prompts[1], Sampling(6)).tokens
    longer = [*prompts[1], *kept, *prompts[3]]
    asked = [*prompts[:3], longer]
    temperatures = (0, 0.9, 0, 1)  # whole numbers, as the command line gives them
    sampled = [Sampling(9, warm, seed=i, ignore_eos=i == 3) for i, warm in enumerate(temperatures)]
    alone = []
    for prompt, sampling in zip(asked, sampled, strict=True):
        graph.forget()
        alone.append(graph.reply(prompt, sampling).tokens)
    room = graph._room(4, 200)
    first = Asked(prompts[1], Sampling(6))
    first.tokens += room.admit({2: first})
    first.tokens += [room.launch().wait()[2] for _ in range(5)]
    assert first.tokens == kept
    room.release(2)
    passes: list[int] = []
    read = room._pass
    monkeypatch.setattr(room, "_pass", lambda some: (passes.append(len(some)), read(some))[1])
    requests = [(i, one) for i, one in enumerate(zip(asked, sampled, strict=True))][::-1]
    found = dict(graph.stream(requests, 4))
    assert [found[i].tokens for i in range(4)] == alone
    assert found[3].reused_tokens == len(prompts[1]) + 5
    moments = {(reply.first_token_at, reply.time_to_first_token) for reply in found.values()}
    assert len(passes) == len(moments) == expected


def accounted(room: Slots) -> list[int]:
    """All pages that are lent or free, in order."""
    return sorted([*room.pages._free, *(page for held in room.pages.held for page in held)])


@pytest.mark.usefixtures("ahead", "short_pages")
@pytest.mark.parametrize("spare", [0, 3, 10, None])
def test_with_few_pages_answers_are_set_back_and_stay_the_same(
    graph: GraphEngine, model: Any, prompts: list[list[int]], spare: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [(prompt, Sampling(TOKENS, 0.9 * (i % 2), seed=i)) for i, prompt in enumerate([*prompts, *prompts[::-1]])]

    def then(key: int, reply: Any) -> Any:
        return None if key >= 8 else (key + 8, ([*asked[key][0], *reply.tokens, *prompts[3]], asked[7 - key][1]))

    alone = []
    for key in range(16):
        if key >= 8:
            asked.append(then(key - 8, alone[key - 8])[1])
        graph.forget()
        alone.append(graph.reply(*asked[key]))
    longest = max(len(prompt) + TOKENS for prompt, _ in asked)
    needed = pages.pages_of(longest + 1) + 1
    engine = GraphEngine(model, graph.tokenizer, TOKENS, batch_size=4, pages=None if spare is None else needed + spare)
    room = engine.places(longest)
    assert room.pages.count == (4 * (needed - 1) + 1 if spare is None else needed + spare)
    set_back, launch = [], room.launch

    def counted() -> Any:
        oldest = next(iter(room.running))
        arrival = launch()
        assert oldest not in arrival.set_back
        set_back.extend(arrival.set_back)
        return arrival

    monkeypatch.setattr(room, "launch", counted)
    for _ in range(2):
        found = dict(engine.stream(enumerate(asked[:8]), longest=longest, then=then))
        assert [found[key].tokens for key in range(16)] == [reply.tokens for reply in alone]
        assert all(len(reply.intervals) == len(reply.tokens) - 1 for reply in found.values())
        assert not room.running
        assert accounted(room) == list(range(1, room.pages.count))
    assert (spare is None) == (not set_back)
    if spare is None:
        assert all(found[key].reused_tokens >= len(alone[key - 8].tokens) for key in range(8, 16))
    engine.forget()
    assert len(room.pages._free) == room.pages.count - 1


@pytest.mark.usefixtures("ahead", "short_pages")
def test_a_stream_that_is_left_gives_its_pages_back(model: Any, prompts: list[list[int]]) -> None:
    engine = GraphEngine(model, None, TOKENS, batch_size=2, pages=30)
    going = engine.stream([(i, (prompt, Sampling(2 + 20 * (i % 2)))) for i, prompt in enumerate(prompts)])
    next(iter(going))
    going.close()
    room = engine._slots
    assert room is not None
    assert not room.running
    assert room.pages.available == room.pages.count - 1
    expected = EagerEngine(model, None, TOKENS).reply(prompts[1], Sampling(TOKENS)).tokens
    assert engine.reply_batch(prompts[:2], Sampling(TOKENS))[1].tokens == expected


def test_pages_kept_for_longest_are_given_up_first() -> None:
    pool = Pages(7, 4)
    for place, count in enumerate([2, 1, 2]):
        pool.use(place, 0)
        assert pool.grow(place, count) == []
    assert pool.available == 1
    assert not any(pages.SCRAP in held for held in pool.held)
    for place in (1, 0):
        pool.keep(place)
    assert pool.available == 4
    kept = pool.held[0][:1]
    assert pool.grow(3, 2) == [1]
    pool.use(0, 1)
    assert pool.held[0] == kept
    assert pool.grow(0, 2) == []
    assert pool.available == 0
    with pytest.raises(IndexError):
        pool.grow(2, 3)
    assert Pages(2, 1).available == 2


@pytest.mark.usefixtures("ahead")
def test_an_answer_ends_at_the_end_token(graph: GraphEngine, model: Any, prompts: list[list[int]]) -> None:
    free = graph.reply(prompts[1], Sampling(TOKENS)).tokens
    eos, model.generation_config.eos_token_id = model.generation_config.eos_token_id, [free[5]]
    try:
        ended = GraphEngine(model, graph.tokenizer, TOKENS)
        reply = ended.reply(prompts[1], Sampling(TOKENS))
        first = free.index(free[5])
        assert reply.tokens == free[: first + 1]
        assert reply.finish_reason == "stop"
        together = ended.reply_batch(prompts, Sampling(TOKENS))
        assert together[1].tokens == reply.tokens
        endless = Sampling(TOKENS, ignore_eos=True)
        ignoring = ended.reply(prompts[1], endless)
        assert len(ignoring.tokens) == TOKENS
        assert free[5] not in ignoring.tokens
        assert ignoring.tokens == EagerEngine(model, None, TOKENS).reply(prompts[1], endless).tokens
    finally:
        model.generation_config.eos_token_id = eos


@pytest.mark.usefixtures("ahead")
def test_sampled_answers_depend_on_their_own_seed_alone(graph: GraphEngine, prompts: list[list[int]]) -> None:
    alone = graph.reply(prompts[2], Sampling(TOKENS, 0.8, seed=7)).tokens
    assert graph.reply(prompts[2], Sampling(TOKENS, 0.8, seed=8)).tokens != alone
    requests = [(0, (prompts[0], Sampling(TOKENS, 1.0, seed=1))), (1, (prompts[2], Sampling(TOKENS, 0.8, seed=7)))]
    assert dict(graph.stream(requests, 2))[1].tokens == alone
    greedy = [(0, (prompts[0], Sampling(TOKENS))), (1, (prompts[2], Sampling(TOKENS, 0.8, seed=7)))]
    assert dict(graph.stream(greedy, 2))[0].tokens == graph.reply(prompts[0], Sampling(TOKENS)).tokens


def test_samples_follow_the_softmax(graph: GraphEngine, model: Any, prompts: list[list[int]]) -> None:
    n, warm = 800, 1.0
    slots = graph._room(1, 64)
    asked = Asked(prompts[0], Sampling(2, warm, seed=5))
    slots.admit({0: asked})
    with torch.inference_mode():
        logits = model(torch.tensor([prompts[0]])).logits[:, -1].float()
        counts = torch.zeros(logits.shape[-1])
        for _ in range(n):
            slots.step._draw([(0, asked)])
            counts[int(slots.step._choose(logits, slice(0, 1), True))] += 1
    slots.release(0)
    expected = (logits[0] / warm).softmax(-1)
    top = expected.topk(5).indices
    error = (expected[top] * (1 - expected[top]) / n).sqrt()
    assert ((counts[top] / n - expected[top]).abs() < 4.5 * error).all()


def test_the_cache_grows_by_pages_and_stays(graph: GraphEngine, prompts: list[list[int]]) -> None:
    graph.reply(prompts[0], Sampling(TOKENS))
    first = graph._slots
    assert first is not None
    assert first.capacity == PAGE
    graph.reply(prompts[1], Sampling(TOKENS))
    assert graph._slots is first
    graph.reply(prompts[2], Sampling(PAGE))
    assert graph._slots is not None
    assert graph._slots.capacity == 2 * PAGE


@pytest.mark.usefixtures("ahead")
def test_an_answer_can_be_stopped_and_streams(graph: GraphEngine, prompts: list[list[int]]) -> None:
    pieces: list[str] = []
    whole = graph.reply(prompts[1], Sampling(TOKENS), pieces.append)
    assert "".join(pieces).strip() == whole.text
    calls = iter([False, False, True, True])
    reply = graph.reply(prompts[1], Sampling(TOKENS), should_stop=lambda: next(calls))
    assert reply.finish_reason == "stopped"
    assert reply.tokens == whole.tokens[:3]


def test_adapters_answer_and_are_switched(graph: GraphEngine, model: Any, tokenizer: Any, prompts: Any) -> None:
    from peft import LoraConfig, get_peft_model

    plain = graph.reply(prompts[1], Sampling(TOKENS)).tokens
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    try:
        tuned.eval()
        engine = GraphEngine(tuned, tokenizer, TOKENS)
        expected = EagerEngine(tuned, tokenizer, TOKENS).reply(prompts[1], Sampling(TOKENS)).tokens
        assert expected != plain
        assert engine.reply(prompts[1], Sampling(TOKENS)).tokens == expected
        engine.use_adapter(None)
        assert engine.reply(prompts[1], Sampling(TOKENS)).tokens == plain
    finally:
        tuned.unload()


def test_tuned_normalisations_answer_and_are_switched_off(
    graph: GraphEngine, model: Any, tokenizer: Any, prompts: Any
) -> None:
    from peft import LNTuningConfig, get_peft_model

    plain = graph.reply(prompts[1], Sampling(TOKENS)).tokens
    names = ["input_layernorm", "post_attention_layernorm", "norm"]
    tuned = get_peft_model(model, LNTuningConfig(target_modules=names)).eval()
    try:
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "ln_tuning" in name:
                    parameter.uniform_(0.5, 1.5)
        engine = GraphEngine(tuned, tokenizer, TOKENS)
        expected = EagerEngine(tuned, tokenizer, TOKENS).reply(prompts[1], Sampling(TOKENS)).tokens
        assert expected != plain
        assert engine.reply(prompts[1], Sampling(TOKENS)).tokens == expected
        engine.use_adapter(None)
        assert engine.reply(prompts[1], Sampling(TOKENS)).tokens == plain
    finally:
        tuned.unload()


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_other_members_of_the_family(kind: str, prompts: list[list[int]]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(2)
    sizes = {"vocab_size": 49152, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
    options = {"sliding_window": None} if kind == "mistral" else {}
    tiny = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **options)).eval()
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.normal_(0, 0.3) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
    engine = GraphEngine(tiny, None, TOKENS)
    assert engine.eager_because is None
    expected = EagerEngine(tiny, None, TOKENS).reply(prompts[1], Sampling(TOKENS)).tokens
    assert len(set(expected)) > 3
    assert engine.reply(prompts[1], Sampling(TOKENS)).tokens == expected


def test_what_it_cannot_do_is_answered_eagerly_with_the_reason(prompts: list[list[int]]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 49152, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 256}
    config = AutoConfig.for_model("gpt2", **sizes, eos_token_id=0)
    other = AutoModelForCausalLM.from_config(config).eval()
    engine = GraphEngine(other, None, 4)
    assert "not built as Llama" in engine.describe()["engine"]
    expected = EagerEngine(other, None, 4)
    assert engine.reply(prompts[0], Sampling(4)).tokens == expected.reply(prompts[0], Sampling(4)).tokens
    assert len(engine.reply_batch(prompts, Sampling(4))) == 4
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    window = AutoConfig.for_model("mistral", **sizes, sliding_window=8)
    with torch.device("meta"), pytest.raises(Unsupported, match="sliding window"):
        decoder_of(AutoModelForCausalLM.from_config(window))


def test_int8_says_why_no_graph_is_captured() -> None:
    class Linear8bitLt(nn.Module):
        pass

    assert "outliers" in (uncapturable(nn.Sequential(Linear8bitLt())) or "")
    assert uncapturable(nn.Sequential(nn.Linear(1, 1))) is None


def test_a_graph_that_cannot_be_captured_is_done_without(
    graph: GraphEngine, model: Any, tokenizer: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def captured(self: Step, sampled: bool, size: int) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(Step, "_captured", captured)
    graph.capture = True
    (expected,) = eager_tokens(model, tokenizer, prompts[1:2])
    assert graph.reply(prompts[1], Sampling(TOKENS)).tokens == expected
    assert graph.describe()["engine"].endswith("no graph, since operation not permitted when stream is capturing")


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize(("capture", "expected"), [(None, {5, 4, 3, 2, 1}), (1, {5, 4, 2, 1}), (4, {5, 4})])
def test_a_step_has_as_many_rows_as_sequences_run(
    graph: GraphEngine,
    prompts: list[list[int]],
    capture: int | None,
    expected: set[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where steps are captured, ``capture`` is the smallest for which there is memory."""

    class Replayed:
        def __init__(self, step: Any) -> None:
            self.replay = step

    def captured(self: Step, sampled: bool, size: int) -> Any:
        if size < (capture or 0):
            raise torch.OutOfMemoryError
        return Replayed(lambda: self._advance(sampled, size))

    asked = [(prompt, Sampling(4 * i + 2, 0.9 * (i % 2), seed=i)) for i, prompt in enumerate([*prompts, prompts[0]])]
    alone = [graph.reply(*one).tokens for one in asked]
    monkeypatch.setattr(Step, "_captured", captured)
    graph.close()
    graph.capture = capture is not None
    room = graph._room(5, 200)
    sizes: list[int] = []
    next_token = room.decoder.next_token
    monkeypatch.setattr(
        room.decoder, "next_token", lambda tokens, *rest: (sizes.append(len(tokens)), next_token(tokens, *rest))[1]
    )
    found = dict(graph.stream(enumerate(asked), 5, 199))
    assert [found[i].tokens for i in range(5)] == alone
    assert sizes == sorted(sizes, reverse=True)
    assert set(sizes) == expected
    assert len(sizes) == len(alone[-1]) - 1  # the longest answer's


def test_joining_adds_no_memory_and_keeps_the_layers(graph: GraphEngine, model: Any, prompts: list[list[int]]) -> None:
    before = EagerEngine(model, None, 4).reply(prompts[0], Sampling(4)).tokens
    graph.reply(prompts[0], Sampling(4))
    attention = model.model.layers[0].self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert parts[0].untyped_storage().nbytes() == sum(part.nbytes for part in parts)
    again = GraphEngine(model, graph.tokenizer, 4)
    again.reply(prompts[0], Sampling(4))
    assert parts[0].data_ptr() == attention.q_proj.weight.data_ptr()
    assert EagerEngine(model, None, 4).reply(prompts[0], Sampling(4)).tokens == before
