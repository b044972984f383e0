"""A study's grades as one array, and its resamples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm_at_home.human.study import GradeRow

RESAMPLES = 2000


@dataclass(frozen=True)
class Grades:
    """Grades of shape (raters, models, questions), NaN where there is none, and what the axes are."""

    values: np.ndarray
    raters: list[int]
    models: list[str]
    questions: list[int]

    @classmethod
    def of(cls, rows: Sequence[GradeRow], raters: int, models: Sequence[str], questions: Sequence[int]) -> Grades:
        """All raters who have a link, also those who graded nothing."""
        numbers = list(range(1, raters + 1))
        values = np.full((raters, len(models), len(questions)), np.nan)
        for row in rows:
            if row.grade is not None:
                place = numbers.index(row.rater), models.index(row.model), questions.index(row.question_id)
                values[place] = row.grade
        return cls(values, numbers, list(models), list(questions))

    @property
    def known(self) -> np.ndarray:
        """Where there is a grade; the shape of ``values``."""
        return ~np.isnan(self.values)

    def active(self) -> Grades:
        """Without the raters who graded nothing."""
        kept = [i for i, grades in enumerate(self.known) if grades.any()]
        return Grades(self.values[kept], [self.raters[i] for i in kept], self.models, self.questions)


@dataclass(frozen=True)
class Draws:
    """How often each rater and each question was drawn: shapes (resamples, raters) and (resamples, questions)."""

    raters: np.ndarray
    questions: np.ndarray


def whole(grades: Grades) -> Draws:
    """The one "resample" in which everything is there once."""
    return Draws(np.ones((1, len(grades.raters))), np.ones((1, len(grades.questions))))


def pigeonhole_draws(grades: Grades, seed: int = 0) -> Draws:
    """Raters and questions drawn with replacement, independently of each other.

    A grade counts as often as its rater was drawn times as often as its question was (Owen 2007, "The pigeonhole
    bootstrap", Annals of Applied Statistics 1(2)): both are a sample of those that might have been. A single question
    is taken as it is.
    """
    generator = np.random.default_rng(seed)
    raters, questions = len(grades.raters), len(grades.questions)
    drawn = generator.multinomial(raters, np.full(raters, 1 / raters), RESAMPLES)
    asked = generator.multinomial(questions, np.full(questions, 1 / questions), RESAMPLES)
    return Draws(drawn.astype(float), asked.astype(float))


def answer_means(grades: Grades, draws: Draws) -> np.ndarray:
    """The mean over raters of each answer's grades: (resamples, models, questions); NaN where nobody graded it."""
    flat = grades.values.reshape(len(grades.raters), len(grades.models) * len(grades.questions))
    sums = draws.raters @ np.nan_to_num(flat)
    counts = draws.raters @ grades.known.reshape(flat.shape).astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums / counts
    return means.reshape(-1, len(grades.models), len(grades.questions))


def model_means(answers: np.ndarray, draws: Draws) -> np.ndarray:
    """The mean over questions of :func:`answer_means`, each question alike, as in the paper: (resamples, models).

    An answer that nobody graded is left out of it.
    """
    known = ~np.isnan(answers)
    weights = draws.questions[:, None, :] * known
    with np.errstate(invalid="ignore", divide="ignore"):
        means: np.ndarray = (np.nan_to_num(answers) * weights).sum(-1) / weights.sum(-1)
    return means


def interval95(draws: np.ndarray) -> tuple[float, float] | None:
    """The percentile interval; None where under nine in ten resamples gave a number."""
    finite = draws[np.isfinite(draws)]
    if len(finite) < 0.9 * len(draws) or not len(draws):
        return None
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)
