"""A finding in words, for a terminal, a page in Markdown and the report alike."""

from __future__ import annotations

import math
from pathlib import PurePath

from llm_at_home.reporting import facts
from llm_at_home.reporting.claims.verdict import Case, Finding
from llm_at_home.reporting.load import Run

_ROOTS = ("results", "multirun")


def asked(finding: Finding) -> str:
    """The claim as a test: the figure, the effect, and where it has to lie."""
    claim = finding.claim
    figure = f"`{claim.figure}`" + (f" / `{claim.per}`" if claim.per else "")
    effect = {"value": figure, "difference": f"{figure} of a − of b", "ratio": f"{figure} of a / of b"}[claim.effect]
    return f"{effect} {claim.threshold}"


def effect(case: Case) -> str:
    """The effect with unit and interval."""
    if case.estimate is None:
        return "–"
    unit = "" if case.estimate.unit == "1" else f" {case.estimate.unit}"
    ends = case.estimate.interval
    interval = f" [{_number(ends[0])}, {_number(ends[1])}]" if ends and ends[0] != ends[1] else ""
    exact = " (exact)" if ends and ends[0] == ends[1] else ""
    return f"{_number(case.estimate.value)}{interval}{unit}{exact}"


def name(run: Run) -> str:
    """A run by its folder below ``results`` or ``multirun``, or by the last parts of another."""
    parts = PurePath(run.path).parent.parts
    known = [number for number, part in enumerate(parts) if part in _ROOTS]
    return facts.clean("/".join(parts[known[-1] + 1 :] if known else parts[-3:]))


def where(finding: Finding) -> str:
    """On which models and machines it was looked at."""
    found = dict.fromkeys(f"{facts.model(c.runs[0].record)} on {facts.device(c.runs[0].record)}" for c in finding.cases)
    return "; ".join(found)


def _number(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.4g}".replace("-", "−") if abs(value) < 1000 else f"{value:,.0f}".replace("-", "−")
