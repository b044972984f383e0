"""Rank correlations of people's grades with a judge's scores and with fidelity figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from llm_at_home.human.compared import Judge
from llm_at_home.human.grades import Draws, Grades, answer_means, interval95, model_means, pigeonhole_draws, whole
from llm_at_home.records.schema import Reading

METHOD = "people/bootstrap_of_raters_and_questions"
KINDS = ("spearman", "kendall")
FEWEST = 3  # of two, any order is a correlation of 1 or -1

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
    everything = whole(active)
    drawn = pigeonhole_draws(active) if len(active.raters) > 1 else None
    readings: dict[str, Reading] = {}
    for judge in judges:
        name = f"judge_{judge.name}"
        resampled = _models_with_judge(active, judge, drawn) if drawn else None
        readings |= _readings("models", name, next(_models_with_judge(active, judge, everything)), resampled)
        resampled = _answers_with_judge(active, judge, drawn) if drawn else None
        readings |= _readings("answers", name, next(_answers_with_judge(active, judge, everything)), resampled)
    for name, figures in fidelity.items():
        resampled = _models_with_figures(active, figures, drawn) if drawn else None
        readings |= _readings("models", name, next(_models_with_figures(active, figures, everything)), resampled)
    return readings


def rank_correlations(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Spearman's rho and Kendall's tau-b of two vectors, pairs with a NaN left out.

    NaN for fewer than three pairs, and where one side is all ties. scipy's functions, whose values these are, spend
    most of their time on p-values, and the bootstrap calls this thousands of times.
    """
    from scipy.stats import rankdata

    both = ~(np.isnan(x) | np.isnan(y))
    x, y = x[both], y[both]
    if len(x) < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan, np.nan
    rank_x, rank_y = rankdata(x), rankdata(y)
    order_x = np.sign(rank_x[:, None] - rank_x)
    order_y = np.sign(rank_y[:, None] - rank_y)
    tau = (order_x * order_y).sum() / np.sqrt(np.abs(order_x).sum() * np.abs(order_y).sum())
    return float(np.corrcoef(rank_x, rank_y)[0, 1]), float(tau)


def _readings(over: str, name: str, pair: Pair, resampled: Iterator[Pair] | None) -> dict[str, Reading]:
    both = int((~(np.isnan(pair[0]) | np.isnan(pair[1]))).sum())
    values = rank_correlations(*pair)
    if not np.isfinite(values).all():
        why = (
            f"{both} {over} are known to both, and a rank correlation needs {FEWEST}"
            if both < FEWEST
            else f"one side gives all {both} {over} the same"
        )
        return {f"{kind}_{over}/{name}": Reading.unknown("1", why, METHOD) for kind in KINDS}
    draws = np.array([rank_correlations(*one) for one in resampled]) if resampled is not None else None
    return {
        f"{kind}_{over}/{name}": Reading(
            values[k], "1", METHOD, interval95=None if draws is None else interval95(draws[:, k]), n=both
        )
        for k, kind in enumerate(KINDS)
    }


def _models_with_judge(grades: Grades, judge: Judge, draws: Draws) -> Iterator[Pair]:
    answers = answer_means(grades, draws)
    scores = np.broadcast_to(judge.scores, answers.shape)
    neither = np.isnan(answers) | np.isnan(scores)
    people, judged = (model_means(np.where(neither, np.nan, side), draws) for side in (answers, scores))
    yield from zip(people, judged, strict=True)


def _answers_with_judge(grades: Grades, judge: Judge, draws: Draws) -> Iterator[Pair]:
    for answers, times in zip(answer_means(grades, draws), draws.questions, strict=True):
        drawn = np.repeat(np.arange(len(times)), times.astype(int))
        yield answers[:, drawn].ravel(), judge.scores[:, drawn].ravel()


def _models_with_figures(grades: Grades, figures: np.ndarray, draws: Draws) -> Iterator[Pair]:
    for people in model_means(answer_means(grades, draws), draws):
        yield people, figures
