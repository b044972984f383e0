import pytest

from llm_at_home.evaluation.judge.pairwise import points
from llm_at_home.evaluation.judge.summary import pair_readings, single_readings, tally


def single(question, turn, score, category="math"):
    return {"question_id": question, "turn": turn, "score": score, "category": category, "model": "m"}


def pair(question, first, second, category="math"):
    return {"question_id": question, "turn": 1, "g1_winner": first, "g2_winner": second, "category": category}


def test_missing_scores_are_in_no_mean() -> None:
    rows = [single(1, 1, 4), single(1, 2, 8), single(2, 1, -1), single(2, 2, 3, "math")]
    reading = single_readings(rows, "j")["judge_score_mean"]
    assert (reading.value, reading.unit, reading.n, reading.method) == (5, "points", 2, "j/single")


def test_the_interval_draws_questions_and_not_turns() -> None:
    # Both turns of a question agree, so the spread is that of 20 questions and not of 40 scores.
    rows = [single(q, turn, 2 if q % 2 else 8) for q in range(20) for turn in (1, 2)]
    reading = single_readings(rows, "j")["judge_score_mean"]
    low, high = reading.interval95
    assert reading.value == 5
    assert (high - low) / 2 == pytest.approx(1.96 * 3 / 20**0.5, rel=0.15)


def test_the_interval_is_the_same_for_any_order_of_rows() -> None:
    rows = [single(q, 1, q % 10 + 1) for q in range(30)]
    assert single_readings(rows, "j") == single_readings(rows[::-1], "j")


def test_one_question_has_no_interval() -> None:
    assert single_readings([single(1, 1, 4)], "j")["judge_score_mean"].interval95 is None


def test_a_category_without_scores_is_unknown() -> None:
    rows = [single(1, 1, 4), single(2, 1, -1, "stem") | {"missing": "too long"}]
    readings = single_readings(rows, "j")
    assert readings["judge_score_math"].value == 4
    assert (readings["judge_score_stem"].value, readings["judge_score_turn_2"].value) == (None, None)
    assert "too long" in readings["judge_score_stem"].reason


@pytest.mark.parametrize(
    ("first", "second", "worth"),
    [
        ("model_1", "model_1", 1),
        ("model_2", "model_2", 0),
        ("tie", "tie", 0.5),
        ("model_1", "model_2", 0.5),
        ("model_1", "tie", 0.5),
        ("tie", "model_2", 0.5),
        ("model_1", "error", None),
        ("error", "tie", None),
    ],
)
def test_what_a_comparison_is_worth(first, second, worth) -> None:
    assert points(pair(1, first, second)) == worth


def test_win_rates_and_counts() -> None:
    rows = [
        pair(1, "model_1", "model_1"),
        pair(2, "model_1", "model_2", "stem"),
        pair(3, "error", "tie", "stem"),
    ]
    readings = pair_readings(rows, "j")
    assert (readings["win_rate"].value, readings["win_rate"].n, readings["win_rate"].unit) == (0.75, 2, "1")
    assert readings["win_rate_stem"].value == 0.5
    assert readings["win_rate"].interval95 == (0.5, 1.0)
    assert tally([single(1, 1, -1)], rows) == {
        "judgments": 2,
        "judgments_missing": 2,
        "inconsistent_orders": 1,
    }
