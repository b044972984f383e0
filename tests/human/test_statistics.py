"""Means, intervals, agreement and correlations against figures worked out by hand, published, or scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from llm_at_home.human.agreement import alpha_reading, bias_readings
from llm_at_home.human.compared import Judge
from llm_at_home.human.correlation import correlation_readings, rank_correlations
from llm_at_home.human.grades import Grades, answer_means, interval95, model_means, pigeonhole_draws
from llm_at_home.human.means import difference_name, grade_name, mean_readings
from llm_at_home.human.votes import vote_readings

_ = np.nan


def grades(values) -> Grades:
    """Raters x models x questions."""
    values = np.array(values, dtype=float)
    raters, models, questions = values.shape
    return Grades(values, list(range(1, raters + 1)), [f"m{i}" for i in range(models)], list(range(81, 81 + questions)))


def random_grades(raters: int, models: int, questions: int, seed: int = 0) -> Grades:
    return grades(np.random.default_rng(seed).integers(1, 6, (raters, models, questions)))


def test_means_are_over_raters_then_over_questions():
    # m0: question 81 has 2 and 4, question 82 has 5 alone: the mean over questions is 4, over all grades 3.67.
    readings = mean_readings(grades([[[2, 5], [1, 1]], [[4, _], [3, 1]]]))
    assert readings[grade_name("m0", 81)].value == 3
    assert readings[grade_name("m0", 82)].value == 5
    assert readings[grade_name("m0")].value == 4
    assert (readings[grade_name("m0")].n, readings[grade_name("m0", 82)].n) == (3, 1)
    assert readings[grade_name("m0", 82)].interval95 is None
    # Pairs: -1 and -1 on question 81, -4 on question 82.
    assert readings[difference_name("m1")].value == -2.5
    assert readings[difference_name("m1")].n == 3


def test_an_answer_that_nobody_graded_is_unknown_and_left_out_of_its_mean():
    readings = mean_readings(grades([[[2, _], [1, 1]], [[4, _], [3, 1]]]))
    assert readings[grade_name("m0", 82)].value is None
    assert readings[grade_name("m0", 82)].reason == "nobody has graded this yet"
    assert readings[grade_name("m0")].value == 3


def test_without_grades_everything_is_unknown_with_a_reason_and_one_rater_has_no_interval():
    nothing = grades(np.full((3, 2, 2), np.nan))
    judge = [Judge("j", np.ones((2, 2)))]
    readings = mean_readings(nothing) | {"alpha": alpha_reading(nothing)} | bias_readings(nothing)
    readings |= vote_readings(nothing, judge)
    readings |= correlation_readings(nothing, judge, {"kl": np.array([0.1, 0.2])})
    assert len(readings) == 7 + 1 + 3 + 4 + 6
    assert all(reading.value is None and reading.reason for reading in readings.values())

    one = random_grades(1, 3, 4)
    readings = mean_readings(one)
    assert all(reading.value is not None and reading.interval95 is None for reading in readings.values())
    assert alpha_reading(one).reason == "1 raters have graded, and agreement needs two"
    assert bias_readings(one)["rater_bias/rater_1"].reason == "nobody else has graded the same answers"
    found = correlation_readings(one, [], {"kl": np.array([0.1, 0.2, 0.3])})
    assert found["spearman_models/kl"].interval95 is None


def test_raters_who_graded_nothing_change_no_interval():
    some = random_grades(5, 3, 6)
    values = np.concatenate([some.values, np.full((3, 3, 6), np.nan)])
    assert mean_readings(grades(values)) == mean_readings(some)


def test_the_interval_widens_with_raters_that_differ_and_with_questions_that_differ():
    generator = np.random.default_rng(1)

    def width(rater_spread: float, question_spread: float) -> float:
        values = 3 + 0.2 * generator.standard_normal((8, 1, 10))
        values += rater_spread * np.linspace(-1, 1, 8)[:, None, None]
        values += question_spread * np.linspace(-1, 1, 10)
        low, high = mean_readings(grades(values))[grade_name("m0")].interval95
        return high - low

    quiet, raters, questions, both = width(0, 0), width(1, 0), width(0, 1), width(1, 1)
    assert raters > 3 * quiet
    assert questions > 3 * quiet
    assert both > 1.2 * max(raters, questions)


def test_the_two_way_bootstrap_has_the_variance_that_its_paper_gives_for_additive_effects():
    # With x = a_i + b_j and nothing else, the variance of the resampled mean is var(a)/R + var(b)/Q exactly.
    a, b = np.linspace(-1, 1, 8), np.linspace(-2, 2, 10)
    one = grades((3 + a[:, None, None]) + b)
    drawn = pigeonhole_draws(one)
    means = model_means(answer_means(one, drawn), drawn)[:, 0]
    assert means.var() == pytest.approx(a.var() / 8 + b.var() / 10, rel=0.08)
    assert means.mean() == pytest.approx(3, abs=0.05)


def test_intervals_hold_what_they_promise_for_simulated_raters():
    # 8 raters and 20 questions are few, so a percentile interval falls a little short of 95 %.
    generator = np.random.default_rng(3)
    hits = 0
    for _trial in range(100):
        values = 3 + 0.5 * generator.standard_normal((8, 1, 1)) + 0.7 * generator.standard_normal((1, 1, 20))
        low, high = mean_readings(grades(values + 0.8 * generator.standard_normal((8, 1, 20))))[
            "human_grade/m0"
        ].interval95
        hits += low < 3 < high
    assert 0.85 < hits / 100 <= 0.99


def test_alpha_is_that_of_krippendorffs_own_example():
    # Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", part C: four observers, twelve units, ordinal
    # alpha 0.815 (nominal 0.743, interval 0.849).
    rows = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
        [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
    ]
    reading = alpha_reading(grades(np.array(rows)[:, None, :]))
    assert reading.value == pytest.approx(0.815, abs=5e-4)
    assert reading.n == 11  # one observer alone saw the twelfth
    assert reading.interval95[0] < 0.815 < reading.interval95[1] <= 1


def test_alpha_of_agreement_of_chance_and_of_one_grade_alone():
    same = grades(np.tile(np.arange(20).reshape(1, 4, 5) % 5 + 1, (3, 1, 1)))
    assert alpha_reading(same).value == pytest.approx(1)
    assert alpha_reading(same).interval95 == pytest.approx((1, 1))
    assert abs(alpha_reading(random_grades(8, 5, 20)).value) < 0.05
    assert "every grade is the same" in alpha_reading(grades(np.full((3, 2, 2), 4))).reason
    apart = grades([[[3, _]], [[_, 4]]])
    assert alpha_reading(apart).reason == "no answer has been graded by two raters"


def test_a_raters_bias_is_against_the_others_on_the_same_answers():
    readings = bias_readings(grades([[[5, 4, _]], [[3, 2, 1]], [[1, _, 1]]]))
    # Rater 1: 5 - 2 and 4 - 2. Rater 2: 3 - 3, 2 - 4, 1 - 1. Rater 3: 1 - 4, 1 - 1.
    assert [readings[f"rater_bias/rater_{i}"].value for i in (1, 2, 3)] == pytest.approx([2.5, -2 / 3, -1.5])
    assert [readings[f"rater_bias/rater_{i}"].n for i in (1, 2, 3)] == [2, 3, 2]
    low, high = readings["rater_bias/rater_1"].interval95
    assert low == 2
    assert high == 3


def test_rank_correlations_are_scipys():
    generator = np.random.default_rng(0)
    for n in (3, 4, 7, 40):
        for _trial in range(10):
            x, y = generator.integers(0, 5, n).astype(float), generator.integers(0, 5, n).astype(float)
            if np.ptp(x) and np.ptp(y):
                expected = stats.spearmanr(x, y).statistic, stats.kendalltau(x, y).statistic
                assert rank_correlations(x, y) == pytest.approx(expected)
    assert rank_correlations(np.array([1, 2, _, 3]), np.array([1, 2, 0, 3])) == pytest.approx((1, 1))
    for x, y in (([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [_, 2, 3])):
        assert np.isnan(rank_correlations(np.array(x), np.array(y))).all()


def test_people_and_a_judge_are_compared_over_models_and_over_answers():
    people = random_grades(4, 4, 6)
    means = people.values.mean(0)
    agreeing = correlation_readings(people, [Judge("good", 2 * means), Judge("bad", -means)], {})
    for kind in ("spearman", "kendall"):
        assert agreeing[f"{kind}_answers/judge_good"].value == pytest.approx(1)
        assert agreeing[f"{kind}_models/judge_bad"].value == pytest.approx(-1)
        assert (agreeing[f"{kind}_models/judge_good"].n, agreeing[f"{kind}_answers/judge_good"].n) == (4, 24)
    low, high = agreeing["spearman_answers/judge_good"].interval95
    assert 0 < low <= high <= 1
    # A score that is missing takes the same answer out of both sides.
    scores = means.copy()
    scores[0, :5] = np.nan
    part = correlation_readings(people, [Judge("part", scores)], {})
    assert part["spearman_answers/judge_part"].n == 19
    expected = stats.spearmanr([means[0, 5], *means[1:].mean(1)], [scores[0, 5], *scores[1:].mean(1)]).statistic
    assert part["spearman_models/judge_part"].value == pytest.approx(expected)


def test_a_correlation_that_says_nothing_is_unknown():
    people = random_grades(4, 3, 6)
    figures = {"kl": np.array([0.1, _, 0.3]), "same": np.array([0.0, 0.0, 0.0])}
    readings = correlation_readings(people, [], figures)
    assert readings["kendall_models/kl"].reason == "2 models are known to both, and a rank correlation needs 3"
    assert readings["spearman_models/same"].reason == "one side gives all 3 models the same"


def test_votes_on_pairs_are_counted_with_and_without_ties():
    # Question 81: rater 1 says a > b = c, rater 2 a > b > c; question 82: both a = b = c but rater 2 lacks c.
    people = grades([[[5, 3], [2, 3], [2, 3]], [[4, 1], [3, 1], [1, _]]])
    judge = Judge("j", np.array([[9, 9], [8, 7], [8, 9]], dtype=float))
    readings = vote_readings(people, [judge])
    # Raters: the same on a/b and a/c, not on b/c; and on a/b of 82.
    assert (readings["agreement_with_ties/people"].value, readings["agreement_with_ties/people"].n) == (0.75, 4)
    assert (readings["agreement_without_ties/people"].value, readings["agreement_without_ties/people"].n) == (1, 2)
    # The judge says a > b = c on 81, and a = c > b on 82: rater 1 agrees on 3 + 1 pairs of 6, rater 2 on 2 + 0 of 4.
    assert readings["agreement_with_ties/judge_j"].value == pytest.approx(6 / 10)
    assert (readings["agreement_without_ties/judge_j"].value, readings["agreement_without_ties/judge_j"].n) == (1, 4)
    low, high = readings["agreement_with_ties/judge_j"].interval95
    assert 0 <= low < 0.6 < high <= 1


def test_votes_by_chance_agree_by_chance():
    readings = vote_readings(random_grades(8, 5, 40), [Judge("j", random_grades(1, 5, 40, seed=9).values[0])])
    for who in ("people", "judge_j"):
        assert readings[f"agreement_without_ties/{who}"].value == pytest.approx(0.5, abs=0.05)
        # Five grades alike: a tie in 1 of 5 pairs, so 0.2² + 0.4² + 0.4².
        assert readings[f"agreement_with_ties/{who}"].value == pytest.approx(0.36, abs=0.04)


def test_an_interval_is_not_taken_from_a_few_resamples_that_worked():
    assert interval95(np.array([1.0] * 89 + [_] * 11)) is None
    assert interval95(np.array([1.0] * 91 + [_] * 9)) == (1, 1)
