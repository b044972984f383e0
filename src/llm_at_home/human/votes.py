"""Which of two answers is better: how often two raters, or a rater and a judge, say the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from llm_at_home.human.compared import Judge
from llm_at_home.human.grades import RESAMPLES, Grades, interval95, pigeonhole_draws
from llm_at_home.records.schema import Reading

METHOD = "votes_on_pairs_of_answers"
#: With ties a vote is better, worse or the same; without, pairs that either side calls the same are left out.
TIES = ("with_ties", "without_ties")


def vote_readings(grades: Grades, judges: Sequence[Judge]) -> dict[str, Reading]:
    """``agreement_TIES/people`` and ``agreement_TIES/judge_NAME``, 0 to 1; ``n`` counts pairs of votes.

    A vote is on two models' answers to one question, by the order of their grades or mean scores. The agreement is that
    of a rater drawn at random with the judge, or with another rater, on a pair drawn at random (Zheng et al. 2023,
    "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", section 4): what raters reach among themselves is what a
    judge can be measured by. Intervals resample raters and questions; among raters questions alone, since a rater
    drawn twice would agree with himself.
    """
    active = grades.active()
    people = _votes(active.values)
    readings = _among_people(people)
    for judge in judges:
        readings |= _with_judge(active, people, judge)
    return readings


def _votes(scores: np.ndarray) -> np.ndarray:
    """1, 0 or -1 for each pair of models: (..., models, questions) to (..., pairs, questions); NaN without a vote."""
    pairs = list(combinations(range(scores.shape[-2]), 2))
    first, second = ([pair[i] for pair in pairs] for i in (0, 1))
    votes: np.ndarray = np.sign(scores[..., first, :] - scores[..., second, :])
    return votes


def _hits(one: np.ndarray, other: np.ndarray, ties: str) -> tuple[np.ndarray, np.ndarray]:
    """How many pairs of models both sides see the same way, and of how many: summed over pairs."""
    counted = ~(np.isnan(one) | np.isnan(other))
    if ties == "without_ties":
        counted &= (one != 0) & (other != 0)
    return ((one == other) & counted).sum(-2).astype(float), counted.sum(-2).astype(float)


def _with_judge(grades: Grades, people: np.ndarray, judge: Judge) -> dict[str, Reading]:
    readings = {}
    for ties in TIES:
        hits, counted = _hits(people, _votes(judge.scores), ties)
        interval = None
        if len(grades.raters) > 1:
            drawn = pigeonhole_draws(grades)
            sums = [((drawn.raters @ one) * drawn.questions).sum(1) for one in (hits, counted)]
            interval = _interval(*sums)
        readings[f"agreement_{ties}/judge_{judge.name}"] = _reading(hits, counted, interval)
    return readings


def _among_people(people: np.ndarray) -> dict[str, Reading]:
    readings = {}
    raters = list(combinations(range(len(people)), 2))
    questions = people.shape[-1]
    for ties in TIES:
        found = [_hits(people[i], people[j], ties) for i, j in raters]
        hits, counted = (np.sum([one[k] for one in found], axis=0) if found else np.zeros(questions) for k in (0, 1))
        interval = None
        if questions > 1:
            times = np.random.default_rng(0).multinomial(questions, np.full(questions, 1 / questions), RESAMPLES)
            interval = _interval(times @ hits, times @ counted)
        readings[f"agreement_{ties}/people"] = _reading(hits, counted, interval)
    return readings


def _interval(hits: np.ndarray, counted: np.ndarray) -> tuple[float, float] | None:
    with np.errstate(invalid="ignore", divide="ignore"):
        return interval95(hits / counted)


def _reading(hits: np.ndarray, counted: np.ndarray, interval: tuple[float, float] | None) -> Reading:
    n = int(counted.sum())
    if not n:
        return Reading.unknown("1", "there is no pair of answers that both sides have a vote on", METHOD)
    return Reading(float(hits.sum() / n), "1", METHOD, interval95=interval, n=n)
