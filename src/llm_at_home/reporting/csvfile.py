"""One CSV file a table: plain numbers, intervals and reasons in columns of their own."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from llm_at_home.reporting.cells import Cell, Column, Entry, Table


def write(table: Table, out: Path) -> Path:
    """Write ``<table>.csv`` into ``out``; an unknown value is an empty field beside a reason."""
    path = out / f"{table.key}.csv"
    rows: list[dict[str, str]] = []
    for row in table.rows:
        rows.append({"record": safe(os.path.relpath(row.source, out)), "marks": "; ".join(row.marks)})
    names = ["record", "marks"]
    for column in table.columns:
        for fields, row in zip(rows, table.rows, strict=True):
            said = _fields(column, row.cells[column.key])
            fields |= said
            names += [name for name in said if name not in names]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def _fields(column: Column, cell: Cell) -> dict[str, str]:
    unit = f" [{column.unit}]" if column.unit else ""
    if column.kind == "pair":
        before, after = cell.entries
        return _numeric(f"{column.key}_before", unit, before) | _numeric(f"{column.key}_after", unit, after)
    if column.kind == "number":
        return _numeric(column.key, unit, cell.entries[0])
    known = [entry for entry in cell.entries if entry.value is not None]
    if column.kind == "many":
        said = "; ".join(f"{entry.label}: {entry.text}" for entry in known)
    else:
        said = "; ".join(entry.text for entry in known)
    reasons = "; ".join(dict.fromkeys(entry.reason for entry in cell.entries if entry.reason))
    return {column.key + unit: safe(said)} | ({f"{column.key}_reason": safe(reasons)} if reasons else {})


def _numeric(name: str, unit: str, entry: Entry) -> dict[str, str]:
    fields = {name + unit: _plain(entry.value)}
    if entry.bounds:
        fields |= {f"{name}_{end}{unit}": _plain(b) for end, b in zip(("low95", "high95"), entry.bounds, strict=True)}
    return fields | ({f"{name}_reason": safe(entry.reason)} if entry.reason else {})


def _plain(value: object) -> str:
    # Twelve digits hold any measurement, without the tail that a change of unit leaves (95.39999999999999).
    return f"{value:.12g}" if isinstance(value, int | float) else ""


def safe(text: str) -> str:
    """A text of other people as a field that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
