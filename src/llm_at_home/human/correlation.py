"""Rank correlations of people's grades with a judge's scores and with fidelity figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from llm_at_home.human.compared import Judge
from llm_at_home.human.grades import Draws, Grades, answer_means, interval95, model_means, pigeonhole_draws, whole
from llm_at_home.records.schema import Reading

METHOD = "people/bootstrap_of_raters_and_questions"
KINDS = ("spearman", "kendall")
FEWEST = 3  # of two, any order is a correlation of 1 or -1
AT_ONCE = 2_000_000  # differences held in memory

Pair = tuple[np.ndarray, np.ndarray]


def correlation_readings(
    grades: Grades, judges: Sequence[Judge], fidelity: Mapping[str, np.ndarray]
) -> dict[str, Reading]:
    """Spearman's rho and Kendall's tau-b, over models and, with a judge, over answers.

    ``KIND_models/NAME`` compares the models' means over questions, ``KIND_answers/NAME`` the means of each answer, in
    both cases of what both sides know. ``n`` counts models or answers. A fidelity figure that is better when it is
    lower (a divergence) agrees with people when its correlation is negative.
    """
    active = grades.active()
    once = whole(active)
    drawn = pigeonhole_draws(active) if len(active.raters) > 1 else None
    readings: dict[str, Reading] = {}

    def add(over: str, name: str, pair: Callable[[Draws], Pair]) -> None:
        readings.update(_readings(over, name, pair(once), pair(drawn) if drawn else None))

    for judge in judges:
        add("models", f"judge_{judge.name}", partial(_models_with_judge, active, judge))
        add("answers", f"judge_{judge.name}", partial(_answers_with_judge, active, judge))
    for name, figures in fidelity.items():
        add("models", name, partial(_models_with_figures, active, figures))
    return readings


def rank_correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rho and Kendall's tau-b along the last axis, pairs with a NaN left out: shape (2, ...).

    NaN for fewer than three pairs, and where one side is all ties. Both follow from the signs of all differences: their
    sums by row are, up to a constant, the ranks with ties shared. scipy has the same for one pair of vectors at a time,
    with p-values that the bootstrap would throw away by the thousand.
    """
    known = ~(np.isnan(x) | np.isnan(y))
    both = known[..., :, None] & known[..., None, :]
    of_x, of_y = _signs(x, both), _signs(y, both)
    found = np.stack([_cosine(of_x.sum(-1), of_y.sum(-1), (-1,)), _cosine(of_x, of_y, (-2, -1))])
    return np.where(known.sum(-1) < FEWEST, np.nan, found)


def _signs(x: np.ndarray, both: np.ndarray) -> np.ndarray:
    # Single precision is exact for sums of signs, and half the memory.
    signs = np.sign(x[..., :, None] - x[..., None, :], dtype=np.float32, casting="same_kind")
    signs[~both] = 0
    return signs


def _cosine(x: np.ndarray, y: np.ndarray, axis: tuple[int, ...]) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine: np.ndarray = (x * y).sum(axis) / np.sqrt((x * x).sum(axis) * (y * y).sum(axis))
    return cosine


def _readings(over: str, name: str, pair: Pair, resampled: Pair | None) -> dict[str, Reading]:
    """Of one pair of shape (1, n), and of its resamples, of shape (resamples, n)."""
    both = int((~(np.isnan(pair[0]) | np.isnan(pair[1]))).sum())
    values = rank_correlations(*pair)[:, 0]
    if not np.isfinite(values).all():
        why = (
            f"{both} {over} are known to both, and a rank correlation needs {FEWEST}"
            if both < FEWEST
            else f"one side gives all {both} {over} the same"
        )
        return {f"{kind}_{over}/{name}": Reading.unknown("1", why, METHOD) for kind in KINDS}
    intervals: list[tuple[float, float] | None] = [None] * len(KINDS)
    if resampled is not None:
        few = max(1, AT_ONCE // pair[0].size ** 2)
        parts = range(0, len(resampled[0]), few)
        drawn = [rank_correlations(*(side[start : start + few] for side in resampled)) for start in parts]
        intervals = [interval95(one) for one in np.concatenate(drawn, axis=1)]
    return {
        f"{kind}_{over}/{name}": Reading(float(value), "1", METHOD, interval95=interval, n=both)
        for kind, value, interval in zip(KINDS, values, intervals, strict=True)
    }


def _models_with_judge(grades: Grades, judge: Judge, draws: Draws) -> Pair:
    answers = answer_means(grades, draws)
    neither = np.isnan(answers) | np.isnan(judge.scores)
    people, judged = (np.where(neither, np.nan, side) for side in (answers, judge.scores))
    return model_means(people, draws), model_means(judged, draws)


def _answers_with_judge(grades: Grades, judge: Judge, draws: Draws) -> Pair:
    places = np.arange(len(grades.questions))
    drawn = np.stack([np.repeat(places, times.astype(int)) for times in draws.questions])
    people = np.take_along_axis(answer_means(grades, draws), drawn[:, None, :], axis=2)
    judged = judge.scores[:, drawn].swapaxes(0, 1)
    return people.reshape(len(drawn), -1), judged.reshape(len(drawn), -1)


def _models_with_figures(grades: Grades, figures: np.ndarray, draws: Draws) -> Pair:
    people = model_means(answer_means(grades, draws), draws)
    return people, np.broadcast_to(figures, people.shape)
