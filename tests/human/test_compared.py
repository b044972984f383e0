"""Which judgments and which fidelity figures belong to which of a study's models."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llm_at_home.errors import Refusal
from llm_at_home.human.compared import read_fidelity, read_judges
from llm_at_home.human.runs import Model
from llm_at_home.records import store
from llm_at_home.records.schema import Reading, Record

BASE = {"model": {"name": "tiny"}, "dtype": "float32"}
MODELS = [
    Model("none", "tiny-none", "a", {**BASE, "quant": {"name": "none"}}, "hash-none", "none"),
    Model("nf4", "tiny-nf4", "b", {**BASE, "quant": {"name": "nf4"}}, "hash-nf4", "none"),
    Model("lora", "tiny-nf4-lora", "c", {**BASE, "quant": {"name": "nf4"}}, "hash-lora", "lora"),
]


def judgment(model: str, question: int, turn: int, score: float, judge: str = "gpt-4") -> dict[str, object]:
    return {
        "question_id": question,
        "model": model,
        "judge": [judge, "single-v1"],
        "turn": turn,
        "score": score,
    }


@pytest.fixture
def judged(tmp_path):
    def write(name, rows, subject=None):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "judgments.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        store.save(Record("evaluate", subject={"config_hash": subject} if subject else None), folder)
        return folder

    return write


def test_scores_are_means_over_turns_and_a_missing_one_is_left_out_and_counted(judged):
    rows = [judgment("tiny-none", 81, 1, 8), judgment("tiny-none", 81, 2, 5), judgment("tiny-none", 82, 1, -1)]
    rows += [judgment("tiny-none", 82, 2, 4), judgment("tiny-none", 83, 1, -1), judgment("tiny-none", 99, 1, 1)]
    pair = {"question_id": 81, "model_1": "tiny-none", "model_2": "b", "judge": ["gpt-4", "pair"], "g1_winner": "tie"}
    more = [judgment("tiny-nf4", 81, 1, 2)]
    folders = [judged("0", [*rows, pair], "hash-none"), judged("1", more, "hash-nf4")]
    (judge,) = read_judges(folders, MODELS, [81, 82, 83])
    assert judge.name == "gpt-4"
    np.testing.assert_array_equal(judge.scores, [[6.5, 4, np.nan], [2, np.nan, np.nan], [np.nan] * 3])
    assert judge.missing == 6


def test_two_judges_are_kept_apart(judged):
    rows = [judgment("tiny-none", 81, 1, 8), judgment("tiny-none", 81, 1, 3, "local")]
    assert [(j.name, j.scores[0, 0]) for j in read_judges([judged("0", rows)], MODELS, [81])] == [
        ("gpt-4", 8),
        ("local", 3),
    ]


def test_judgments_of_another_run_of_the_same_name_are_refused(judged):
    rows = [judgment("tiny-none", 81, 1, 8)]
    with pytest.raises(Refusal, match="none of the study's models"):
        read_judges([judged("0", rows, "hash-of-another-run")], MODELS, [81])
    with pytest.raises(Refusal, match="none of the study's models"):
        read_judges([judged("1", [judgment("gpt-3.5", 81, 1, 8)])], MODELS, [81])
    # FastChat's own files have no record, and the name is all there is.
    file = judged("2", rows) / "judgments.jsonl"
    (file.parent / "record.json").unlink()
    assert read_judges([file], MODELS, [81])[0].scores[0, 0] == 8


def test_fidelity_is_of_the_base_with_the_same_quantization_and_of_no_adapter(tmp_path):
    quality = {
        "kl_divergence_mean": Reading(0.05, "nats/token", "m"),
        "kl_divergence_mean_detectable": Reading(0.01, "nats/token", "m"),
        "perplexity": Reading.unknown("1", "overflow"),
    }
    config = {**BASE, "quant": {"name": "nf4"}, "task": "fidelity"}
    store.save(Record("evaluate", config=config, quality=quality), tmp_path / "f")
    figures = read_fidelity([tmp_path / "f"], MODELS)
    assert list(figures) == ["kl_divergence_mean"]
    np.testing.assert_array_equal(figures["kl_divergence_mean"], [np.nan, 0.05, np.nan])
    for changed in ({"dtype": "float16"}, {"quant": {"name": "awq"}}):
        store.save(Record("evaluate", config={**config, **changed}, quality=quality), tmp_path / "g")
        with pytest.raises(Refusal, match="none of the study's models"):
            read_fidelity([tmp_path / "g"], MODELS)
    store.save(Record("infer", config=BASE), tmp_path / "h")
    with pytest.raises(Refusal, match="task=fidelity"):
        read_fidelity([tmp_path / "h"], MODELS)
