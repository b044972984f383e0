"""Geometry of a plot of two figures: ``plot.svg.jinja`` draws it in units of one CSS pixel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from llm_at_home.reporting.figuredata import Data

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 880.0, 64.0, 590.0, 8.0, 44.0
_LABELS = 630.0  # where the column of labels starts, beside the points, which lie too close to hold their own
_LINE = 16.0  # of a label
_LEAST_HEIGHT = 320.0
_LABEL_LENGTH = 38

Scale = Callable[[float], float]


@dataclass(frozen=True)
class Tick:
    """A value that an axis names, and where."""

    text: str
    at: float


@dataclass(frozen=True)
class Dot:
    """A point before it has a place: its figures, its interval, its label, which may be empty, and what it says."""

    label: str
    told: str
    x: float
    y: float
    ends: tuple[float, float]
    marked: bool


@dataclass(frozen=True)
class Point:
    """One point: its place, the ends of its interval (``high`` above ``low``) and its label's line."""

    label: str
    told: str
    x: float
    y: float
    low: float
    high: float
    label_y: float
    marked: bool


@dataclass(frozen=True)
class Plot:
    """A scatter plot; ``description`` tells its figures in words, ``line`` is a front or a diagonal."""

    key: str
    title: str
    note: str
    description: str
    height: float
    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    points: tuple[Point, ...]
    line: str
    data: Data
    width: float = _WIDTH
    left: float = _LEFT
    right: float = _RIGHT
    top: float = _TOP
    labels: float = _LABELS
    kind: ClassVar[str] = "plot"
    wide: ClassVar[bool] = True

    @property
    def bottom(self) -> float:
        """The height at which the horizontal axis lies."""
        return self.height - _BOTTOM


def lay_out(
    key: str,
    title: str,
    note: str,
    titles: tuple[str, str],
    dots: Sequence[Dot],
    data: Data,
    *,
    x_ticks: Sequence[float] | None = None,
    line: Sequence[tuple[float, float]] = (),
) -> Plot:
    """Place two dots or more on logarithmic axes, their labels in a column beside them.

    Args:
        titles: of the horizontal and of the vertical axis.
        dots: with positive figures; an interval's end at 0 or below is drawn down to the axis.
        x_ticks: the values that the horizontal axis may name; by default 1, 2 and 5 of each power of ten.
        line: corners of a line in the axes' units, which is drawn through them.
    """
    dots = sorted(dots, key=lambda dot: dot.y, reverse=True)
    height = _TOP + max(_LEAST_HEIGHT, _LINE * sum(bool(dot.label) for dot in dots)) + _BOTTOM
    ends = [end for dot in dots for end in dot.ends if end > 0]
    x = logarithmic([*(dot.x for dot in dots), *(corner[0] for corner in line)], _LEFT, _RIGHT)
    y = logarithmic([*(dot.y for dot in dots), *ends, *(corner[1] for corner in line)], height - _BOTTOM, _TOP)
    places = [y(dot.y) for dot in dots]
    wanted = [place for dot, place in zip(dots, places, strict=True) if dot.label]
    spread = iter(_spread(wanted, _LINE, _TOP + _LINE / 2, height - _BOTTOM))
    lines = [next(spread) if dot.label else place for dot, place in zip(dots, places, strict=True)]
    points = tuple(
        Point(
            dot.label if len(dot.label) <= _LABEL_LENGTH else f"{dot.label[: _LABEL_LENGTH - 1]}…",
            dot.told,
            round(x(dot.x), 1),
            round(place, 1),
            round(y(dot.ends[0]), 1) if dot.ends[0] > 0 else height - _BOTTOM,
            round(y(dot.ends[1]), 1),
            round(label_y, 1),
            dot.marked,
        )
        for dot, place, label_y in zip(dots, places, lines, strict=True)
    )
    shown = [tick for tick in x_ticks if _LEFT <= x(tick) <= _RIGHT] if x_ticks else _ticks(x, _LEFT, _RIGHT)
    return Plot(
        key,
        title,
        note,
        "; ".join(point.told for point in points),
        height,
        *titles,
        tuple(Tick(f"{tick:g}", round(x(tick), 1)) for tick in shown),
        tuple(Tick(f"{tick:g}", round(y(tick), 1)) for tick in _ticks(y, _TOP, height - _BOTTOM)),
        points,
        " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line),
        data,
    )


def logarithmic(values: Sequence[float], start: float, end: float) -> Scale:
    """A scale that leaves a margin of 4 % of its length at both ends."""
    low, high = math.log(min(values)), math.log(max(values))
    if low == high:
        low, high = low - 1, high + 1
    margin = 0.04 * (high - low)
    low, high = low - margin, high + margin
    return lambda value: start + (math.log(value) - low) / (high - low) * (end - start)


def _ticks(scale: Scale, low: float, high: float) -> list[float]:
    every = [step * 10.0**power for power in range(-12, 7) for step in (1, 2, 5)]
    within = [tick for tick in every if low <= scale(tick) <= high]
    decades = [tick for tick in within if math.log10(tick) == round(math.log10(tick))]
    if len(decades) >= 3:
        return decades
    if len(within) >= 2:
        return within
    fine = [step * 10.0**power for power in range(-12, 7) for step in (1, 1.2, 1.4, 1.6, 1.8, *range(2, 10))]
    return [tick for tick in fine if low <= scale(tick) <= high]


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places ``gap`` apart and as near as can be to those wanted, which rise: isotonic regression by pooling."""
    pools: list[tuple[float, int]] = []
    for i, place in enumerate(wanted):
        total, count = place - i * gap, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            before = pools.pop()
            total, count = total + before[0], count + before[1]
        pools.append((total, count))
    starts = [total / count for total, count in pools for _ in range(count)]
    last = high - (len(wanted) - 1) * gap
    return [min(max(start, low), last) + i * gap for i, start in enumerate(starts)]
