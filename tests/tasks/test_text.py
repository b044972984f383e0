"""task=text with and without passages in the prompt, in this process on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from llm_at_home.data.passages import load_passages
from llm_at_home.errors import Refusal
from llm_at_home.generation.reply import Reply
from llm_at_home.records.schema import Record
from llm_at_home.tasks import evaluate, resolve, text

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path):
    """``run(*overrides)`` is the record of such an evaluation and the rows that it left."""

    def evaluated(*overrides: str) -> tuple[Record, list[dict[str, Any]]]:
        words = [
            *("task=text", "gpu=cpu", "model=custom", f"model.source={tiny_model}", "model.name=tiny", "limit=3"),
            *("text.max_new_tokens=4", "text.batch_size=2", *overrides),
        ]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = resolve.resolve("evaluate", compose("evaluate", words), words)
        resolve.check("evaluate", config)
        record = Record("evaluate", config=config)
        evaluate.run(config, tmp_path, record, None)
        return record, [json.loads(line) for line in (tmp_path / text.ANSWERS).read_text().splitlines()]

    return evaluated


def test_the_default_has_costs_beside_quality(run) -> None:
    record, rows = run()
    read, made = (record.readings[f"{kind}_tokens_per_question"] for kind in ("prompt", "generated"))
    assert read.value == record.counts["prompt_tokens"] / 3
    assert (made.value, made.unit, made.n) == (record.counts["generated_tokens"] / 3, "tokens", 3)
    assert 0 < record.readings["prompt_tokens_shared"].value < read.value
    taken = record.readings["time_per_question"]
    assert (taken.unit, taken.method) == ("s", "synchronized_clock_batch_2")
    assert taken.interval95[0] <= taken.value <= taken.interval95[1]
    assert record.readings["decode_tokens_per_second"].value > 0
    energy = record.readings["energy_per_question"]
    assert energy.unit == "J/question"
    assert energy.reason if energy.value is None else energy.value > 0
    assert {"perplexity_test", "perplexity_home_bench"} <= set(record.quality)
    assert "retrieval_recall" not in record.quality
    assert [row["id"] for row in rows] == [f"handbook-test-fact-00{i}" for i in range(3)]
    assert not any("passages" in row for row in rows)


def test_passages_are_in_the_prompts_and_in_the_record(run) -> None:
    bare, _ = run("text.perplexity=false")
    record, rows = run("text.context=retrieved", "text.retrieved=2", "text.perplexity=false")
    assert rows[0]["passages"][0] == "The head of the casting hall is Odile Farrow."
    assert all(1 <= len(row["passages"]) <= 2 for row in rows)
    assert record.quality["retrieval_recall"].value == 1.0
    assert "perplexity_test" not in record.quality
    names = ("prompt_tokens_per_question", "prompt_tokens_shared")
    longer, shared = (record.readings[name].value - bare.readings[name].value for name in names)
    assert longer > 10
    assert shared < longer, "each question has passages of its own"


def test_all_facts_are_a_prefix_that_every_prompt_shares(run) -> None:
    record, rows = run("text.context=all", "text.perplexity=false")
    assert not any("passages" in row for row in rows), "they are the same for each question"
    read, shared = (record.readings[name].value for name in ("prompt_tokens_per_question", "prompt_tokens_shared"))
    assert read - shared < 30 < 10 * len(load_passages("handbook")) < shared


def test_a_prompt_longer_than_the_context_is_refused(run, tmp_path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("The gate of the yard is red and old.\n" * 300)
    with pytest.raises(Refusal, match=r"text.context=all makes a prompt of \d+ tokens.* context of 2048") as refused:
        run("text.context=all", f"text.context_path={long}")
    assert len(str(refused.value).splitlines()) == 1


def test_it_works_on_a_quantized_base(run) -> None:
    record, _ = run("text.context=retrieved", "text.perplexity=false", "quant=nf4")
    assert record.kernel["linear"] == "Linear4bit"
    assert record.readings["time_per_question"].value > 0


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([[1, 2, 3], [1, 2, 4], [1, 2, 3, 5]], 2),
        ([[1, 2], [1, 2, 3]], 2),
        ([[1], [2]], 0),
        ([[7, 8], [7, 8]], 2),
    ],
)
def test_with_how_many_tokens_all_prompts_begin(prompts, shared) -> None:
    assert text.shared_prefix(prompts) == shared


def test_a_question_s_means_by_hand() -> None:
    replies = [Reply("", [0] * made, read, "stop") for read, made in ((10, 1), (20, 3), (60, 5))]
    asked = text.Asked([], [], [[1, 2, 3], [1, 2, 4], [1, 5]], seconds=0.3)
    found = text.question_readings(replies, [2.0, 4.0], [2, 1], asked)
    assert {name: reading.value for name, reading in found.items()} == {
        "prompt_tokens_per_question": 30.0,
        "prompt_tokens_shared": 1.0,
        "generated_tokens_per_question": 3.0,
        "time_per_question": pytest.approx(6.0 / 3 + 0.1),
    }
    # A resample of the two batches is the first twice, the second twice, or both.
    assert found["time_per_question"].interval95 == pytest.approx((1.1, 4.1))
