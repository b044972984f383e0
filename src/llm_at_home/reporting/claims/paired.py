"""Differences of two runs on the same texts or questions, where what the runs left allows a paired comparison."""

from __future__ import annotations

from llm_at_home.errors import Refusal
from llm_at_home.reporting import facts
from llm_at_home.reporting.claims.effect import Estimate
from llm_at_home.reporting.load import Run

JUDGED = "judge_score_mean"


def difference(a: Run, b: Run, figure: str) -> Estimate | None:
    """The figure of a less that of b, its interval a paired bootstrap's over texts or questions.

    None where the runs are of another kind, left too little, or were not made on the same: the caller then has the two
    intervals alone.
    """
    kinds = {facts.evaluation(run.record) for run in (a, b)}
    try:
        if kinds == {"fidelity"}:
            return _fidelity(a, b, figure)
        if kinds == {"judge"} and figure == JUDGED:
            return _judged(a, b)
    except Refusal:
        return None
    return None


def _fidelity(a: Run, b: Run, figure: str) -> Estimate | None:
    from llm_at_home.evaluation.fidelity import comparison

    runs = [comparison.Run.load(run.path.parent) for run in (a, b)]
    found = {one.figure: one for one in comparison.compare(runs[0], runs[1], only=figure)}.get(figure)
    return Estimate(found.difference, found.unit, found.interval95) if found else None


def _judged(a: Run, b: Run) -> Estimate | None:
    from llm_at_home.evaluation.judge import comparison

    runs = [comparison.JudgedRun.load(run.path.parent) for run in (a, b)]
    found = next(iter(comparison.compare(*runs)), None)
    if found is None or found.interval95 is None:
        return None
    return Estimate(found.difference, "points", found.interval95)
