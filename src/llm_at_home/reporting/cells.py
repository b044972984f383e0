"""The parts of a table, and how a reading becomes text; HTML, terminal and CSV all draw from these."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from llm_at_home.records.schema import Reading
from llm_at_home.reporting.facts import clean
from llm_at_home.reporting.load import Run

EN_DASH = "–"
NO_READING = "the record holds no such figure"
# From the unit in a record to a column's unit; any other difference is shown as a difference.
_FACTORS = {("1", "%"): 100.0, ("ms", "s"): 1e-3, ("token/s", "tokens/s"): 1.0, ("step/s", "steps/s"): 1.0}


@dataclass(frozen=True)
class Entry:
    """One value in a cell: ``text`` to show, ``value`` to sort by; None is unknown, ``reason`` says why."""

    text: str
    value: float | str | None = None
    bounds: tuple[float, float] | None = None
    interval: str = ""
    label: str = ""
    detail: str = ""
    reason: str = ""
    source: Path | None = None


@dataclass(frozen=True)
class Cell:
    """What stands in one field: usually one entry; several judges, or a figure before and after training."""

    entries: tuple[Entry, ...]

    @property
    def sort_value(self) -> float | str | None:
        """What sorting goes by: the last known value, which after training is the one "after"."""
        known = [entry.value for entry in self.entries if entry.value is not None]
        return known[-1] if known else None


@dataclass(frozen=True)
class Column:
    """One column: ``key`` is the figure's name in a record, and the column's in the CSV file.

    ``kind`` is "text", "number", "pair" (before and after) or "many" (labelled entries). ``unit`` None takes
    whatever unit the record has; ``terminal`` columns are few enough for 80 characters.
    """

    key: str
    title: str
    group: str = "Run"
    kind: Literal["text", "number", "pair", "many"] = "number"
    unit: str | None = None
    decimals: int = 2
    better: Literal["higher", "lower"] | None = None
    terminal: str = ""

    @property
    def full_title(self) -> str:
        """The title where no group heading stands above it."""
        title = f"{self.group}: {self.title}" if self.group != "Run" else self.title
        return f"{title} ({self.unit})" if self.unit else title

    def entry(self, reading: Reading | None, source: Path | None, label: str = "", missing: str = NO_READING) -> Entry:
        """A reading as this column shows it; ``missing`` is the reason for a reading that is not there."""
        if reading is None or reading.value is None:
            return unknown(clean(reading.reason) if reading else missing, label, source)
        factor = 1.0
        if self.unit and reading.unit != self.unit:
            if (reading.unit, self.unit) not in _FACTORS:
                told = f"recorded as {reading.value:g} {clean(reading.unit)}, which this column cannot hold"
                return unknown(told, label, source)
            factor = _FACTORS[reading.unit, self.unit]
        value, bounds = reading.value * factor, _bounds(reading, factor)
        interval = f"{number(bounds[0], self.decimals)}{EN_DASH}{number(bounds[1], self.decimals)}" if bounds else ""
        detail = [clean(reading.method)]
        detail += [f"95 % interval {interval}"] if interval else []
        detail += [f"n = {reading.n}"] if reading.n is not None else []
        return Entry(
            number(value, self.decimals),
            value,
            bounds,
            interval,
            label,
            "; ".join(part for part in detail if part),
            source=source,
        )


@dataclass(frozen=True)
class Row:
    """One run: a cell a column, the file it comes from, and marks that qualify the whole row."""

    cells: dict[str, Cell]
    source: Path
    marks: tuple[str, ...] = ()
    run: Run | None = None


@dataclass(frozen=True)
class Table:
    """A table with all that a reader needs; ``key`` names its CSV file and its place on the page."""

    key: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    mark_notes: dict[str, str] = field(default_factory=dict)

    @property
    def footnotes(self) -> dict[str, int]:
        """Each reason for an unknown value, and each mark's meaning, with its number, in reading order."""
        reasons: dict[str, int] = {}
        for row in self.rows:
            for mark in row.marks:
                if mark in self.mark_notes:
                    reasons.setdefault(self.mark_notes[mark], len(reasons) + 1)
            for column in self.columns:
                for entry in row.cells[column.key].entries:
                    if entry.reason:
                        reasons.setdefault(entry.reason, len(reasons) + 1)
        return reasons

    def only(self, columns: Iterable[Column]) -> Table:
        """The same rows with fewer columns, and so with fewer footnotes."""
        return replace(self, columns=tuple(columns))


def text(value: object, source: Path | None = None) -> Cell:
    """A cell that holds words."""
    return Cell((Entry(clean(value), clean(value), source=source),))


def unknown(reason: str, label: str = "", source: Path | None = None) -> Entry:
    """An entry for a value that nobody knows; a reason is always there to be read."""
    return Entry(EN_DASH, reason=reason or NO_READING, label=label, source=source)


def number(value: float, decimals: int) -> str:
    """A figure with ``decimals`` places, or two significant digits where those would show next to nothing."""
    if value != round(value) and abs(value) < 10.0 ** (1 - decimals):
        decimals = min(12, 1 - math.floor(math.log10(abs(value))))
    if value and (abs(value) >= 1e12 or abs(value) < 1e-11):
        return f"{value:.2e}"
    return f"{value:,.{decimals}f}".replace("-", "−")


def _bounds(reading: Reading, factor: float) -> tuple[float, float] | None:
    ends = reading.interval95
    if not ends or len(ends) != 2 or not all(isinstance(e, int | float) and math.isfinite(e) for e in ends):
        return None
    return ends[0] * factor, ends[1] * factor
