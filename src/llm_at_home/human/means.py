"""What the paper's Tables II and IV hold: mean grades per question and overall, and differences from the first run."""

from __future__ import annotations

import numpy as np

from llm_at_home.human.grades import Draws, Grades, answer_means, interval95, model_means, pigeonhole_draws, whole
from llm_at_home.records.schema import Reading

UNIT = "points"
METHOD = "people/mean_over_questions"
RESAMPLED = "bootstrap_of_raters_and_questions"
RESAMPLED_RATERS = "bootstrap_of_raters"
NOBODY = "nobody has graded this yet"


def grade_name(model: str, question: int | None = None) -> str:
    """The name in the record of a model's mean grade, overall or on one question."""
    return f"human_grade/{model}" if question is None else f"human_grade/{model}/question_{question}"


def difference_name(model: str) -> str:
    """The name in the record of a model's difference from the first one."""
    return f"human_grade_difference/{model}"


def mean_readings(grades: Grades) -> dict[str, Reading]:
    """Mean grades, 1 to 5 points: of each model overall, on each question, and its difference from the first model.

    ``n`` counts grades. Intervals resample raters and questions, on one question raters alone; with one rater there is
    none. Differences are of the same raters on the same questions.
    """
    active = grades.active()
    if not active.raters:
        return _nothing(grades)
    single = answer_means(active, whole(active))[0]
    overall = model_means(single[None], whole(active))[0]
    drawn = pigeonhole_draws(active) if len(active.raters) > 1 else None
    by_answer = answer_means(active, drawn) if drawn else None
    by_model = model_means(by_answer, drawn) if drawn and by_answer is not None else None
    readings = {}
    for m, model in enumerate(active.models):
        counts = active.known[:, m]
        interval = None if by_model is None else interval95(by_model[:, m])
        method = f"{METHOD}/{RESAMPLED}"
        readings[grade_name(model)] = _reading(overall[m], method, interval, int(counts.sum()))
        for q, question in enumerate(active.questions):
            graders = int(counts[:, q].sum())
            interval = interval95(by_answer[:, m, q]) if by_answer is not None and graders > 1 else None
            method = f"people/mean/{RESAMPLED_RATERS}"
            readings[grade_name(model, question)] = _reading(single[m, q], method, interval, graders)
    return readings | _differences(active, drawn)


def _reading(value: float, method: str, interval: tuple[float, float] | None, n: int) -> Reading:
    if np.isnan(value):
        return Reading.unknown(UNIT, NOBODY, method)
    return Reading(float(value), UNIT, method, interval95=interval, n=n)


def _nothing(grades: Grades) -> dict[str, Reading]:
    names = [grade_name(model, question) for model in grades.models for question in (None, *grades.questions)]
    names += [difference_name(model) for model in grades.models[1:]]
    return {name: Reading.unknown(UNIT, NOBODY, METHOD) for name in names}


def _differences(grades: Grades, drawn: Draws | None) -> dict[str, Reading]:
    """Each model's mean less the first one's, over the grades of raters who graded both answers to a question."""
    readings = {}
    for m, model in enumerate(grades.models[1:], 1):
        pairs = Grades((grades.values[:, m] - grades.values[:, 0])[:, None], grades.raters, [model], grades.questions)
        n = int(pairs.known.sum())
        everything = whole(pairs)
        value = model_means(answer_means(pairs, everything), everything)[0, 0]
        interval = None if drawn is None else interval95(model_means(answer_means(pairs, drawn), drawn)[:, 0])
        method = f"{METHOD}/paired/{RESAMPLED}"
        readings[difference_name(model)] = (
            Reading(float(value), UNIT, method, interval95=interval, n=n)
            if n
            else Reading.unknown(UNIT, "no rater has graded this model and the first on one question", method)
        )
    return readings
