"""The figures behind a figure: what it draws as rows, for its CSV file and for the table below it."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

from llm_at_home.reporting.cells import EN_DASH, Entry, number
from llm_at_home.reporting.csvfile import safe

Value = str | float | None


@dataclass(frozen=True)
class Data:
    """Rows of what a figure shows; ``sources`` has the record of each row, or None where it is of no record."""

    header: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    sources: tuple[Path | None, ...]

    @property
    def shown(self) -> list[tuple[list[str], Path | None]]:
        """The rows as text, each with its record."""
        return [([_text(value) for value in row], one) for row, one in zip(self.rows, self.sources, strict=True)]


def interval(entry: Entry) -> tuple[Value, Value]:
    """The ends of an entry's 95 % interval, or none."""
    return entry.bounds or (None, None)


def write(data: Data, path: Path) -> None:
    """Write the rows as CSV, each with the path of its record relative to the file; an unknown is an empty field."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*data.header, "record"])
        for row, source in zip(data.rows, data.sources, strict=True):
            record = safe(os.path.relpath(source, path.parent)) if source else ""
            writer.writerow([*(_field(value) for value in row), record])


def _field(value: Value) -> str:
    if isinstance(value, str):
        return safe(value)
    return "" if value is None else f"{value:.12g}"


def _text(value: Value) -> str:
    if isinstance(value, str):
        return value
    return EN_DASH if value is None else number(value, 0 if value == round(value) else 3)
