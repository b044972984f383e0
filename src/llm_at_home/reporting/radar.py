"""Geometry of the radar charts: what a judge gave each category, as figures 2 to 4 of the paper show it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from llm_at_home.reporting import facts
from llm_at_home.reporting.cells import Row, Table
from llm_at_home.reporting.figuredata import Data
from llm_at_home.reporting.figures import labels, shortened
from llm_at_home.reporting.plot import Tick

_SIZE, _RADIUS = 400.0, 116.0  # of a phone's width, so that text does not shrink there
_MARGIN = 42.0  # below the last name, where the key begins
_HEAD = 48.0  # above the first name
_KEY_LINE = 18.0
_LABEL_LENGTH = 52
_CHARACTER = 7.2  # width of a letter of a category's name
_MOST = 6  # more outlines in one chart cannot be told apart
_LEAST_AXES = 3
# Figure of the whole, start of a category's name, title, end of the scale, rings, the ring that is no difference, unit.
_KINDS = (
    ("judge_score_mean", "judge_score_", "Judge’s score by category, 1 to 10", 10.0, (2, 4, 6, 8, 10), None, "points"),
    ("win_rate", "win_rate_", "Win rate against the baseline by category", 1.0, (0.25, 0.5, 0.75, 1), 0.5, ""),
)
_NO_CATEGORY = ("mean", "turn_1", "turn_2")


@dataclass(frozen=True)
class Outline:
    """One run: its corners as an SVG path, and what they say."""

    label: str
    told: str
    points: str
    corners: tuple[tuple[float, float], ...]
    style: int


@dataclass(frozen=True)
class Axis:
    """One category: where its line ends, and where and how its name, cut to the room there, stands."""

    name: str
    x: float
    y: float
    label_x: float
    label_y: float
    anchor: str


@dataclass(frozen=True)
class Radar:
    """A radar chart; ``description`` tells its figures to those who cannot see it."""

    key: str
    title: str
    note: str
    description: str
    axes: tuple[Axis, ...]
    rings: tuple[tuple[str, str], ...]
    ticks: tuple[Tick, ...]
    outlines: tuple[Outline, ...]
    neutral: str | None
    data: Data
    size: float = _SIZE
    margin: float = _MARGIN
    head: float = _HEAD
    kind: ClassVar[str] = "radar"
    wide: ClassVar[bool] = False

    @property
    def height(self) -> float:
        """With the key, a line an outline."""
        return self.size - self.head - self.margin + _KEY_LINE * (len(self.outlines) + 0.5)


def radars(table: Table) -> tuple[Radar, ...]:
    """A chart for each judge, kind of grading, and set and number of questions, with three categories or more."""
    if table.key != "evaluations":
        return ()
    made = []
    for whole, start, title, top, rings, neutral, unit in _KINDS:
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in table.rows:
            reading = row.run.record.quality.get(whole) if row.run else None
            if reading is not None and reading.value is not None:
                asked = row.cells["on"].entries[0].text + (f" ({reading.n} questions)" if reading.n else "")
                groups.setdefault((facts.clean(reading.method), asked), []).append(row)
        for number, ((method, questions), rows) in enumerate(groups.items()):
            key = f"radar-{whole}-{number}"
            made.append(_radar(key, f"{title}: {method}, {questions}", rows, start, top, rings, neutral, unit))
    return tuple(radar for radar in made if radar)


def _radar(
    key: str,
    title: str,
    rows: Sequence[Row],
    start: str,
    top: float,
    rings: Sequence[float],
    neutral: float | None,
    unit: str,
) -> Radar | None:
    found = [(name, row, _categories(row, start)) for name, row in zip(labels(rows), rows, strict=True)]
    names = sorted({category for _, _, values in found for category in values})
    whole = [(label, row, values) for label, row, values in found if set(values) == set(names)]
    if len(names) < _LEAST_AXES or not whole:
        return None
    shown, more = whole[:_MOST], len(whole) - _MOST
    notes = [f"The first {_MOST} of {len(whole)} runs."] if more > 0 else []
    lacking = [label for label, _, values in found if set(values) != set(names)]
    notes += [f"Not drawn, for want of a category: {', '.join(lacking)}."] if lacking else []
    notes += ["The dashed ring is no difference."] if neutral is not None else []
    cut = shortened([label for label, _, _ in shown], _LABEL_LENGTH)
    outlines = tuple(
        _outline(label, short, [values[name] / top for name in names], [values[name] for name in names], names, style)
        for style, ((label, _, values), short) in enumerate(zip(shown, cut, strict=True))
    )
    return Radar(
        key,
        title,
        " ".join(notes),
        "; ".join(outline.told for outline in outlines),
        tuple(_axis(name, place, len(names)) for place, name in enumerate(names)),
        tuple((_polygon([ring / top] * len(names)), f"{ring:g}") for ring in rings),
        tuple(Tick(f"{ring:g}", round(_SIZE / 2 - _RADIUS * ring / top, 1)) for ring in rings),
        outlines,
        _polygon([neutral / top] * len(names)) if neutral is not None else None,
        Data(
            ("run", *(f"{name}, {unit}" if unit else name for name in names)),
            tuple((label, *(values[name] for name in names)) for label, _, values in shown),
            tuple(row.source for _, row, _ in shown),
        ),
    )


def _categories(row: Row, start: str) -> dict[str, float]:
    quality = row.run.record.quality if row.run else {}
    return {
        facts.clean(name.removeprefix(start)): reading.value
        for name, reading in quality.items()
        if name.startswith(start) and name.removeprefix(start) not in _NO_CATEGORY and reading.value is not None
    }


def _outline(
    label: str, short: str, shares: Sequence[float], values: Sequence[float], names: Sequence[str], style: int
) -> Outline:
    told = ", ".join(f"{name} {value:.2f}" for name, value in zip(names, values, strict=True))
    corners = tuple(_corner(share, place, len(shares)) for place, share in enumerate(shares))
    return Outline(short, f"{label}: {told}", _polygon(shares), corners, style)


def _polygon(shares: Sequence[float]) -> str:
    return " ".join(f"{x},{y}" for x, y in (_corner(share, i, len(shares)) for i, share in enumerate(shares)))


def _corner(share: float, place: int, count: int) -> tuple[float, float]:
    angle = 2 * math.pi * place / count - math.pi / 2
    reach = _RADIUS * min(max(share, 0.0), 1.0)
    return round(_SIZE / 2 + reach * math.cos(angle), 1), round(_SIZE / 2 + reach * math.sin(angle), 1)


def _axis(name: str, place: int, count: int) -> Axis:
    x, y = _corner(1.0, place, count)
    across, down = (x - _SIZE / 2) / _RADIUS, (y - _SIZE / 2) / _RADIUS
    anchor = "middle" if abs(across) < 0.2 else "start" if across > 0 else "end"
    beside = round(x + 12 * across, 1)
    room = {"start": _SIZE - beside, "end": beside, "middle": 2 * min(beside, _SIZE - beside)}[anchor]
    most = int(room / _CHARACTER)
    short = name if len(name) <= most else f"{name[: most - 1]}…"
    return Axis(short, x, y, beside, round(y + 14 * down + 4, 1), anchor)
