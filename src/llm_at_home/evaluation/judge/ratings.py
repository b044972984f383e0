"""Reads a rating or a verdict out of a judge's reply; what is not there stays unknown."""

from __future__ import annotations

import re
from typing import Literal

Verdict = Literal["A", "B", "tie"]

_DOUBLE = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_SINGLE = re.compile(r"\[(\d+\.?\d*)\]")
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_VERDICTS: dict[str, Verdict] = {"A": "A", "B": "B", "C": "tie"}


def parse_rating(reply: str) -> float | None:
    """The rating, 1 to 10 points, or None when the reply holds none.

    The first ``[[7]]`` or ``[[7.5]]`` counts, and without one the first ``[7]``, as in FastChat's llm_judge
    (Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena"). Other than there, a number
    outside the scale is no rating: ``[[0]]`` and ``[[100]]`` give None.
    """
    found = _DOUBLE.search(reply) or _SINGLE.search(reply)
    if found is None:
        return None
    rating = float(found.group(1))
    return rating if 1 <= rating <= 10 else None


def parse_verdict(reply: str) -> Verdict | None:
    """The better assistant, or ``tie`` for ``[[C]]``, or None when the reply does not decide.

    FastChat takes the first that occurs of A, B and C in this order, which favours A whenever a reply names
    several; here such a reply is undecided.
    """
    named = set(_VERDICT.findall(reply))
    return _VERDICTS[named.pop()] if len(named) == 1 else None
