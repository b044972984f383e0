"""Inference in batches: the same answers in the same order as one by one, and figures that are true of a batch."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from llm_at_home.data.questions import load_questions
from llm_at_home.errors import Refusal
from llm_at_home.generation.eager import EagerEngine
from llm_at_home.generation.reply import temperature_for
from llm_at_home.records.jsonl import read_jsonl
from llm_at_home.records.schema import Record
from llm_at_home.tasks import infer, resolve
from llm_at_home.tasks.turns import ANSWERS, QuestionTurns, RandomTurns

CONF = Path(__file__).resolve().parents[2] / "conf"
TOKENS = 8


@pytest.fixture(scope="module")
def spread(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights spread out, so that greedy tokens vary and ties do not decide."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # threads cost a tiny model more than they give
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    folder = tmp_path_factory.mktemp("models") / "spread"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(spread: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(spread, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(spread)


@pytest.fixture
def engine(loaded) -> EagerEngine:
    return EagerEngine(*loaded, max_new_tokens=TOKENS)


@pytest.fixture(scope="module")
def questions() -> list[Any]:
    """Nine questions whose temperatures alternate, which the file's own order does not."""
    found = load_questions("home_bench")
    chosen = [found[i % len(found)] for i in range(0, 9 * 5, 5)]
    assert len({question.category for question in chosen}) >= 5
    return chosen


def asked(engine: EagerEngine, questions: list[Any], folder: Path, size: int, repeat: int = 0) -> tuple[Any, Any]:
    folder.mkdir(exist_ok=True)
    made = QuestionTurns(questions, "m", 0, size).answer(engine, folder, repeat)
    rows = list(read_jsonl(folder / ANSWERS))
    return made, [{key: value for key, value in row.items() if key != "tstamp"} for row in rows]


@pytest.mark.parametrize("of_random_ids", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_the_warm_up_makes_the_cache_and_the_graphs_of_the_measured_phase(
    loaded, questions, tmp_path, monkeypatch, size, of_random_ids
) -> None:
    """On a GPU a new cache is a graph captured anew, whose time would be in the figures."""
    from llm_at_home.generation import graph
    from llm_at_home.generation.static.slots import Slots
    from llm_at_home.generation.static.step import Step

    made: list[Slots] = []
    monkeypatch.setattr(graph, "Slots", lambda *args: made.append(Slots(*args)) or made[-1])
    monkeypatch.setattr(
        Step, "_captured", lambda self, *kind: SimpleNamespace(replay=functools.partial(self._advance, *kind))
    )
    engine = graph.GraphEngine(*loaded, max_new_tokens=260, batch_size=size, warmup_tokens=8)
    engine.capture = True
    turns: Any = QuestionTurns(questions[:3], "m", 0, size)
    if of_random_ids:
        turns = RandomTurns(3, 8, engine.vocabulary, 0, size)
    infer._warm_up(engine, turns)
    (room,) = made
    graphs = set(room.step._graphs)
    assert {rows for _, rows in graphs} == ({1, 2, 3} if size == 3 else {1})
    turns.answer(engine, tmp_path, 0)
    assert made == [room]
    assert set(room.step._graphs) == graphs


@pytest.mark.parametrize("size", [2, 4, 16])
def test_greedy_answers_are_those_of_one_by_one_in_the_same_order(engine, questions, tmp_path, size) -> None:
    engine.temperature = 0.0
    single, rows = asked(engine, questions, tmp_path / "1", 1)
    batches, together = asked(engine, questions, tmp_path / "n", size)
    assert together == rows
    assert len({str(row["choices"]) for row in rows}) == len(rows), "answers that are all alike would prove little"
    assert [len(batch) for batch in single] == [1] * 2 * len(questions)
    sizes = [min(size, len(questions) - start) for start in range(0, len(questions), size)]
    assert [len(batch) for batch in batches] == [n for n in sizes for _ in range(2)]


def test_the_second_turns_of_a_batch_follow_its_first_ones(engine, questions, tmp_path) -> None:
    engine.temperature = 0.0
    batches, rows = asked(engine, questions[:3], tmp_path, 3)
    assert [len(batch) for batch in batches] == [3, 3]
    assert [[r.text for r in batch] for batch in batches] == [
        [row["choices"][0]["turns"][turn] for row in rows] for turn in (0, 1)
    ]
    first, second = batches
    assert all(b.prompt_tokens > a.prompt_tokens + len(a.tokens) // 2 for a, b in zip(first, second, strict=True))


def test_a_batch_has_one_temperature_and_the_rows_keep_the_questions_order(engine, questions, tmp_path) -> None:
    calls = []
    reply_batch, reply = engine.reply_batch, engine.reply
    engine.reply_batch = lambda p, s: (calls.append((len(p), s)), reply_batch(p, s))[1]
    engine.reply = lambda p, s: (calls.append((1, s)), reply(p, s))[1]
    _, single = asked(engine, questions, tmp_path / "1", 1)
    calls.clear()
    _, rows = asked(engine, questions, tmp_path / "4", 4)
    assert [row["question_id"] for row in rows] == [question.question_id for question in questions]
    assert {sampling.temperature for _, sampling in calls} == {0.7, 0.1, 0.0}
    assert max(n for n, _ in calls) > 1
    assert sum(n for n, _ in calls) == 2 * len(questions)
    # What is greedy does not depend on the batch.
    greedy = [row["category"] in ("math", "coding", "reasoning", "extraction") for row in rows]
    assert any(greedy)
    assert [r for r, g in zip(rows, greedy, strict=True) if g] == [r for r, g in zip(single, greedy, strict=True) if g]


def test_sampling_in_a_batch_repeats_with_its_seed_and_varies_by_pass(engine, questions, tmp_path) -> None:
    engine.temperature = 1.0

    def tokens(repeat: int) -> list[list[int]]:
        made, _ = asked(engine, questions[:4], tmp_path, 4, repeat)
        return [reply.tokens for batch in made for reply in batch]

    assert tokens(0) == tokens(0)
    assert tokens(0) != tokens(1)


def test_questions_of_one_turn_and_of_two_share_a_batch(engine, questions, tmp_path) -> None:
    import dataclasses

    engine.temperature = 0.0
    short = dataclasses.replace(questions[1], turns=questions[1].turns[:1])
    mixed = [questions[0], short, questions[2]]
    _, single = asked(engine, mixed, tmp_path / "1", 1)
    batches, rows = asked(engine, mixed, tmp_path / "3", 3)
    assert rows == single
    assert [len(batch) for batch in batches] == [3, 2]


def test_random_prompts_in_a_batch_give_the_same_full_answers(loaded, tmp_path) -> None:
    engine = EagerEngine(loaded[0], None, max_new_tokens=TOKENS)
    (one, other) = (
        [reply for batch in RandomTurns(5, 7, 1000, 3, size).answer(engine, tmp_path, 0) for reply in batch]
        for size in (1, 4)
    )
    assert [reply.tokens for reply in one] == [reply.tokens for reply in other]
    assert {len(reply.tokens) for reply in other} == {TOKENS}


def config_of(spread: Path, *overrides: str) -> dict[str, Any]:
    words = ["model=custom", f"model.source={spread}", "model.name=spread", "gpu=cpu", "logger=none", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("infer", words)
    return resolve.resolve("infer", composed, words)


def test_a_batched_runs_record_says_what_its_figures_are_of(spread, tmp_path) -> None:
    words = ("limit=5", "engine.batch_size=4", "engine.max_new_tokens=6", "engine.temperature=0", "repeats=3")
    config = config_of(spread, *words)
    record = Record("infer", config=config)
    infer.run(config, tmp_path, record, None)
    counts, readings = record.counts, record.readings
    assert (counts["turns"], counts["batches"]) == (30, 12)
    rows = list(read_jsonl(tmp_path / ANSWERS))
    assert counts["generated_tokens"] == 3 * sum(sum(row["generated_tokens"]) for row in rows)
    assert readings["decode_tokens_per_second"].method == "token_on_host_clock_batch_4"
    spread_of = [readings[f"decode_tokens_per_second_{end}"].value for end in ("min", "median", "max")]
    assert spread_of == sorted(spread_of)
    seconds = readings["measured_time"].value
    assert readings["output_tokens_per_second"].value == pytest.approx(counts["generated_tokens"] / seconds)
    assert record.notes == ["engine.batch_size=4: 2 of 4 batches were smaller, down to 1"]


def test_a_record_says_when_a_conversation_outgrew_the_model(loaded) -> None:
    from llm_at_home.generation.reply import Reply

    engine = EagerEngine(*loaded, max_new_tokens=TOKENS)
    known = loaded[0].config.max_position_embeddings
    whole, longer = (Reply("", [1, 2], known - 2 + more, "length") for more in (0, 1))
    assert infer._too_long([whole], engine) == []
    (note,) = infer._too_long([whole, longer], engine)
    assert note.startswith(f"1 of 2 turns went beyond the {known} tokens that the model knows")


def test_a_batch_of_none_is_refused(spread) -> None:
    with pytest.raises(Refusal, match=r"engine\.batch_size=0"):
        resolve.check("infer", config_of(spread, "engine.batch_size=0"))


def test_several_samples_of_what_is_sampled_and_one_of_what_is_greedy(engine, questions, tmp_path) -> None:
    def rows(folder: str, size: int, samples: int) -> list[dict[str, Any]]:
        (tmp_path / folder).mkdir()
        QuestionTurns(questions[:7], "m", 0, size, samples).answer(engine, tmp_path / folder, 0)
        return list(read_jsonl(tmp_path / folder / ANSWERS))

    one, three = rows("1", 1, 1), rows("3", 1, 3)
    assert [row["question_id"] for row in rows("4", 4, 3)] == [row["question_id"] for row in one]
    greedy = ("math", "coding", "reasoning", "extraction")
    for single, several in zip(one, three, strict=True):
        assert len(several["choices"]) == (1 if single["category"] in greedy else 3)
        assert several["choices"][0] == single["choices"][0], "the first sample is that of a run with one"
        assert [choice["index"] for choice in several["choices"]] == list(range(len(several["choices"])))
        assert len(several["generated_tokens"]) == 2 * len(several["choices"])
    writing = next(row for row in three if row["category"] == "writing")
    assert len({str(choice["turns"]) for choice in writing["choices"]}) == 3


@pytest.mark.parametrize("size", [1, 4])
def test_an_interrupted_run_goes_on_with_the_questions_it_lacks(engine, questions, tmp_path, size) -> None:
    def turns(run_id: str = "hash") -> QuestionTurns:
        return QuestionTurns(questions[:7], "m", 0, size, 2, run_id)

    def kept() -> list[dict[str, Any]]:
        rows = read_jsonl(tmp_path / ANSWERS)
        return [{key: value for key, value in row.items() if key != "tstamp"} for row in rows]

    turns().answer(engine, tmp_path, 0)
    whole, path = kept(), tmp_path / ANSWERS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:30])  # killed while it wrote the fifth
    asked, going = [], turns()
    reply_batch, reply = engine.reply_batch, engine.reply
    engine.reply_batch = lambda p, s: (asked.append(len(p)), reply_batch(p, s))[1]
    engine.reply = lambda p, s: (asked.append(1), reply(p, s))[1]
    going.answer(engine, tmp_path, 0, resume=True)
    everything = 2 * sum(len(row["choices"]) for row in whole)
    assert kept() == whole
    assert 0 < sum(asked) < everything
    assert going.kept == (4 if size == 1 else going.kept)
    assert going.kept > 0
    asked.clear()
    turns("another configuration").answer(engine, tmp_path, 0, resume=True)
    assert sum(asked) == everything
    asked.clear()
    finished = turns("another configuration")
    made = finished.answer(engine, tmp_path, 0, resume=True)
    assert made, "the last batch is measured again"
    assert sum(asked) < everything


@pytest.mark.parametrize("places", [2, 5])
def test_filled_places_give_the_answers_of_one_by_one(loaded, questions, tmp_path, places) -> None:
    from llm_at_home.generation.graph import GraphEngine

    alone, together = GraphEngine(*loaded, max_new_tokens=TOKENS), GraphEngine(*loaded, TOKENS, batch_size=places)
    single, rows = asked(alone, questions, tmp_path / "1", 1)
    (stream,), rows_together = asked(together, questions, tmp_path / "n", places)
    assert rows_together == rows, "sampled ones too: each has its own seed"
    assert {temperature_for(question.category, None) for question in questions} == {0.7, 0.1, 0.0}
    assert len(stream) == 2 * len(questions)
    assert stream.places == places
    seconds = [reply.first_token_at for reply in stream]
    assert 0 < stream.seconds < max(seconds) - min(seconds) + sum(max(stream, key=lambda r: r.intervals).intervals) + 60
    second_turns = [reply for batch in single[1::2] for reply in batch]
    assert all(reply.reused_tokens > 0 for reply in second_turns)


def test_a_stream_s_rates_are_over_its_own_time() -> None:
    from llm_at_home.generation.reply import Reply, Stream
    from llm_at_home.generation.speed import speed_readings

    def reply(at: float, steps: int, first: float, reused: int = 0) -> Reply:
        return Reply("", list(range(steps + 1)), 10, "length", first, [0.1] * steps, reused, at)

    stream = Stream([reply(100.0, 20, 0.5), reply(100.5, 10, 0.25), reply(101.8, 7, 0.25, reused=6)], places=2)
    assert stream.seconds == pytest.approx(2.5)
    figures = speed_readings([[stream]])
    assert figures["decode_tokens_per_second"].value == pytest.approx(37 / 2.5)
    assert figures["prefill_tokens_per_second"].value == pytest.approx(24 / 1.0)
    assert figures["time_to_first_token"].value == pytest.approx(1 / 3)
    assert figures["decode_tokens_per_second"].method == "token_on_host_clock_places_2"


def test_a_measured_run_fills_places(spread, tmp_path) -> None:
    words = ["model=custom", f"model.source={spread}", "engine=graph", "engine.batch_size=3", "limit=5", "logger=none"]
    words += ["gpu=cpu", f"engine.max_new_tokens={TOKENS}", "samples=2"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = resolve.resolve("infer", compose("infer", words), words)
    resolve.check("infer", config)
    record = Record(task="infer", config=config, config_hash="x")
    infer.run(config, tmp_path, record, None)
    assert record.readings["decode_tokens_per_second"].method == "token_on_host_clock_places_3"
    assert record.kernel["engine"] == "static cache, torch kernels, no graph"
    rows = list(read_jsonl(tmp_path / ANSWERS))
    assert [len(row["choices"]) for row in rows] == [
        2 if temperature_for(row["category"], None) > 0 else 1 for row in rows
    ]
    assert record.counts["turns"] == sum(2 * len(row["choices"]) for row in rows)
