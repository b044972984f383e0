"""The Pareto front: of figures that are both better when lower, those that no other beats in both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

Pair = tuple[float, float]


def front(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs than which no other is as low in both and lower in one, from left to right."""
    best: list[Pair] = []
    for pair in sorted(set(pairs)):
        if not best or pair[1] < best[-1][1]:
            best.append(pair)
    return best


def steps(best: Sequence[Pair]) -> list[Pair]:
    """The corners of the line below which nothing was measured: a step from each of the front to the next."""
    corners = list(best[:1])
    for before, after in pairwise(best):
        corners += [(after[0], before[1]), after]
    return corners
