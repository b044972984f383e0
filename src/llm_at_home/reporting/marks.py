"""Geometry of dots or bars against lines of reference: memory against cards, cost against other prices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llm_at_home.reporting.cells import number
from llm_at_home.reporting.figuredata import Data

# Per cent of the width; the rest holds the value at the longest bar's end.
_FULL = 84.0
_HEAD, _NAME, _BAR, _GAP, _KEY = 20.0, 17.0, 15.0, 6.0, 17.0
_NEAR = 3.0  # per cent: lines closer than this share a letter


@dataclass(frozen=True)
class Group:
    """One method with a value, or None, for each series, and the record of each."""

    label: str
    values: tuple[float | None, ...]
    sources: tuple[Path | None, ...]


@dataclass(frozen=True)
class Line:
    """A line of reference: where it stands, and what the key says of it."""

    value: float
    text: str


@dataclass(frozen=True)
class Bar:
    """One bar: ``style`` is its series, ``width`` in per cent."""

    y: float
    width: float
    text: str
    style: int


@dataclass(frozen=True)
class Rule:
    """A line as drawn: its place in per cent and the letter that the key explains."""

    at: float
    letter: str


@dataclass(frozen=True)
class Marked:
    """The chart; ``description`` tells its figures to those who cannot see it."""

    key: str
    title: str
    note: str
    description: str
    height: float
    names: tuple[tuple[str, float], ...]
    bars: tuple[Bar, ...]
    rules: tuple[Rule, ...]
    series: tuple[tuple[str, float, int], ...]
    entries: tuple[tuple[str, str, float], ...]
    floor: float
    dots: bool
    data: Data
    kind: ClassVar[str] = "marked"
    wide: ClassVar[bool] = False


def draw(
    key: str,
    title: str,
    note: str,
    series: Sequence[str],
    groups: Sequence[Group],
    lines: Sequence[Line],
    unit: str,
    *,
    logarithmic: bool = False,
    decimals: int = 1,
) -> Marked:
    """Draw a bar a series and group, or a dot on a logarithmic scale, which has no zero for a bar to begin at.

    Raises:
        ValueError: when no group has a value.
    """
    known = [value for group in groups for value in group.values if value is not None]
    top, bottom = max([*known, *(line.value for line in lines)]), min([*known, *(line.value for line in lines)])

    def place(value: float) -> float:
        if not logarithmic:
            return round(_FULL * value / top, 2)
        spread = math.log(top / bottom) or 1.0
        return round(4 + (_FULL - 4) * math.log(value / bottom) / spread, 2)

    y, names, bars = _HEAD, [], []
    for group in groups:
        names.append((group.label, y + 13))
        y += _NAME
        for style, value in enumerate(group.values):
            if value is not None:
                bars.append(Bar(y, place(value), number(value, decimals), style))
                y += _BAR
        y += _GAP
    floor = y
    rules, entries = _lettered(sorted(lines, key=lambda line: line.value), place)
    y += _KEY
    placed_series = tuple((name, y + i * _KEY, i) for i, name in enumerate(series))
    y += _KEY * len(series)
    placed = tuple((letter, text, y + i * _KEY) for i, (letter, text) in enumerate(entries))
    y += _KEY * len(entries)
    told = "; ".join(
        f"{group.label}: "
        + ", ".join(
            f"{name} {number(value, decimals)} {unit}" if value is not None else f"{name} unknown"
            for name, value in zip(series, group.values, strict=True)
        )
        for group in groups
    )
    lined = "; ".join(text for _, text in entries)
    rows = [(group.label, name, value) for group in groups for name, value in zip(series, group.values, strict=True)]
    sources = [source for group in groups for source in group.sources]
    return Marked(
        key,
        title,
        note,
        f"{told}. Lines: {lined}" if lined else told,
        y,
        tuple(names),
        tuple(bars),
        rules,
        placed_series,
        placed,
        floor,
        logarithmic,
        Data(
            ("name", "what", unit),
            (*rows, *(("line", line.text, line.value) for line in lines)),
            (*sources, *(None for _ in lines)),
        ),
    )


def _lettered(lines: Sequence[Line], place: Callable[[float], float]) -> tuple[tuple[Rule, ...], list[tuple[str, str]]]:
    rules: list[Rule] = []
    entries = []
    for line in lines:
        at = place(line.value)
        if not rules or at - rules[-1].at >= _NEAR:
            rules.append(Rule(at, chr(ord("A") + len(rules))))
        entries.append((rules[-1].letter, line.text))
    return tuple(rules), entries
