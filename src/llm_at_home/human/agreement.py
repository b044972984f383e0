"""How far raters agree (Krippendorff's alpha), and how strict each of them is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llm_at_home.human.grades import RESAMPLES, Grades, interval95
from llm_at_home.human.study import GRADES
from llm_at_home.records.schema import Reading

ALPHA = "krippendorff_alpha"
ALPHA_METHOD = "ordinal/bootstrap_of_questions"
BIAS_METHOD = "grade_less_others_mean/bootstrap_of_questions"


def bias_name(rater: int) -> str:
    """The name in the record of a rater's bias."""
    return f"rater_bias/rater_{rater}"


def alpha_reading(grades: Grades) -> Reading:
    """Krippendorff's alpha for ordinal data, 1 for agreement and 0 for chance; a unit is one answer.

    Its interval resamples questions, with all their answers, and not raters: a rater drawn twice would agree with
    himself. (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability".)
    """
    active = grades.active()
    if len(active.raters) < 2:
        return Reading.unknown("1", f"{len(active.raters)} raters have graded, and agreement needs two", ALPHA_METHOD)
    shared = active.known.sum(0) > 1
    if not shared.any():
        return Reading.unknown("1", "no answer has been graded by two raters", ALPHA_METHOD)
    value = _alpha(active.values)
    if value is None:
        return Reading.unknown("1", "every grade is the same, so chance agreement is all there is", ALPHA_METHOD)
    interval = _resampled(active.values.shape[2], lambda drawn: _alpha(active.values[:, :, drawn]))
    return Reading(value, "1", ALPHA_METHOD, interval95=interval, n=int(shared.sum()))


def _alpha(values: np.ndarray) -> float | None:
    import krippendorff

    # Only answers that two raters graded are paired; alpha is 0/0 when all their grades are one.
    units = values.reshape(len(values), -1)
    known = ~np.isnan(units)
    paired = known.sum(0) > 1
    if len(np.unique(units[:, paired][known[:, paired]])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=units, value_domain=list(GRADES), level_of_measurement="ordinal"))


def bias_readings(grades: Grades) -> dict[str, Reading]:
    """Each rater's grades less the mean of all other raters' grades of the same answers, in points.

    Above 0 is milder than the others. ``n`` counts answers. The mean is over answers; its interval resamples questions.
    """
    return {bias_name(rater): _bias(grades, i) for i, rater in enumerate(grades.raters)}


def _bias(grades: Grades, rater: int) -> Reading:
    own = grades.values[rater]
    if np.isnan(own).all():
        return Reading.unknown("points", "this rater has graded nothing", BIAS_METHOD)
    others = np.delete(grades.values, rater, axis=0)
    counts = (~np.isnan(others)).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        differences = own - np.nansum(others, axis=0) / counts
    compared = int((~np.isnan(differences)).sum())
    if not compared:
        return Reading.unknown("points", "nobody else has graded the same answers", BIAS_METHOD)
    interval = _resampled(differences.shape[1], lambda drawn: _mean(differences[:, drawn]))
    return Reading(float(np.nanmean(differences)), "points", BIAS_METHOD, interval95=interval, n=compared)


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _resampled(questions: int, statistic: Callable[[np.ndarray], float | None]) -> tuple[float, float] | None:
    """The interval over questions, None for fewer than two."""
    if questions < 2:
        return None
    generator = np.random.default_rng(0)
    drawn = [statistic(generator.integers(0, questions, questions)) for _ in range(RESAMPLES)]
    return interval95(np.array([np.nan if value is None else value for value in drawn]))
