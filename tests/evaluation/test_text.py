from __future__ import annotations

import numpy as np
import pytest

from llm_at_home.evaluation.text import bootstrap_interval95, is_refusal, share, squad_scores, text_quality

REFUSAL = "The handbook does not say."


@pytest.mark.parametrize(
    ("prediction", "reference", "exact"),
    [
        ("The Red Room.", "red room", 1.0),
        ("  a  red\troom!! ", "Red Room", 1.0),
        ("red rooms", "red room", 0.0),
        ("It is the red room", "red room", 0.0),
        ("", "red room", 0.0),
        ("9:30", "930", 1.0),
        ("Theatre", "atre", 0.0),
    ],
)
def test_exact_match_overlooks_case_articles_punctuation_and_blanks(prediction, reference, exact) -> None:
    assert squad_scores(prediction, reference)[0] == exact


@pytest.mark.parametrize(
    ("prediction", "reference", "f1"),
    [
        ("red room", "red room", 1.0),
        ("it is the red room", "red room", 2 * (2 / 4) * (2 / 2) / (2 / 4 + 2 / 2)),  # "the" is no token
        ("blue room", "big red room", 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)),
        ("red red", "red room", 2 * (1 / 2) * (1 / 2) / (1 / 2 + 1 / 2)),
        ("blue", "red", 0.0),
        ("", "red", 0.0),
    ],
)
def test_token_f1_by_hand(prediction: str, reference: str, f1: float) -> None:
    assert squad_scores(prediction, reference)[1] == pytest.approx(f1, abs=1e-6)


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        (REFUSAL, True),
        ("the handbook  does not say", True),
        ("Sorry: the handbook does NOT say!", True),
        ("The handbook says nine.", False),
        ("", False),
    ],
)
def test_a_refusal_is_known_whatever_case_and_punctuation(answer: str, refused: bool) -> None:
    assert is_refusal(answer, REFUSAL) is refused


def test_each_figure_is_over_its_own_questions() -> None:
    kinds = ["fact", "fact", "fact", "fact", "refusal", "refusal"]
    references = ["nine", "red room", "Ada", "ten", REFUSAL, REFUSAL]
    predictions = ["Nine.", "the blue room", REFUSAL, "ten", "the handbook does not say", "Blue"]
    figures = text_quality(kinds, predictions, references, REFUSAL)
    assert {name: (r.value, r.n, r.unit) for name, r in figures.items()} == {
        "exact_match": (0.5, 4, "1"),
        "token_f1": (pytest.approx((1 + 0.5 + 0 + 1) / 4), 4, "1"),
        "refusal_recall": (0.5, 2, "1"),
        "false_refusal_rate": (0.25, 4, "1"),
    }
    assert {r.method for r in figures.values()} == {"squad", "canonical_refusal"}
    for reading in figures.values():
        low, high = reading.interval95
        assert 0 <= low <= reading.value <= high <= 1


def test_a_data_set_without_refusals_has_no_figure_about_them() -> None:
    assert set(text_quality(["fact"], ["a"], ["b"], None)) == {"exact_match", "token_f1"}


def test_no_question_is_unknown_with_the_reason_and_not_zero() -> None:
    figures = text_quality(["fact"], ["nine"], ["nine"], REFUSAL)
    assert figures["exact_match"].value == 1.0
    assert figures["refusal_recall"].value is None
    assert figures["refusal_recall"].reason == "the test split has no such question"
    assert all(reading.value is None and reading.reason for reading in text_quality([], [], [], REFUSAL).values())


def test_one_question_has_a_value_and_no_interval() -> None:
    assert share([1.0], "squad").interval95 is None


@pytest.mark.parametrize(("n", "ones"), [(2, 1), (5, 1), (60, 57), (200, 0), (200, 90)])
def test_the_interval_holds_the_mean_and_has_the_right_width(n: int, ones: int) -> None:
    values = [1.0] * ones + [0.0] * (n - ones)
    reading = share(values, "squad")
    low, high = reading.interval95
    assert low <= reading.value <= high
    if n == 200:
        assert high - low == pytest.approx(2 * 1.96 * np.std(values) / np.sqrt(n), rel=0.12, abs=1e-12)
    assert share(values, "squad") == reading, "the draws are seeded"


def test_the_bootstrap_resamples_items_of_any_statistic() -> None:
    data = np.random.default_rng(1).normal(5, 1, 400)
    low, high = bootstrap_interval95(400, lambda chosen: float(np.median(data[chosen])))
    assert low < np.median(data) < high
    assert high - low == pytest.approx(2 * 1.96 * 1.2533 / 20, rel=0.35)
    assert bootstrap_interval95(1, lambda chosen: 0.0) is None
