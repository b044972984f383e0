"""The tables in a terminal: the columns that fit, and the reasons as numbered notes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_at_home.reporting.cells import Cell, Table
from llm_at_home.reporting.facts import clean
from llm_at_home.reporting.load import Loaded

if TYPE_CHECKING:
    from rich.console import Console


def show(tables: Sequence[Table], loaded: Loaded, page: Path, console: Console | None = None) -> None:
    """Print the tables, their notes, the files left out, and where the page is."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = console or Console()
    for full in tables:
        table = full.only(column for column in full.columns if column.terminal)
        notes = table.footnotes
        # Text, never markup: a model may be called "[red]".
        drawn = RichTable(
            title=table.title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for column in table.columns:
            drawn.add_column(
                Text(column.terminal),
                justify="right" if column.kind in ("number", "pair") else "left",
                overflow="fold",
            )
        for row in table.rows:
            words = [_words(row.cells[column.key], notes) for column in table.columns]
            for mark in row.marks:
                number = notes.get(table.mark_notes.get(mark, ""))
                words[0] += f" ({mark})" + (f" [{number}]" if number else "")
            drawn.add_row(*map(Text, words))
        console.print(drawn)
        for reason, number in notes.items():
            console.print(Text(f"  [{number}] {reason}", style="dim"))
        console.print()
    for file in loaded.left_out:
        console.print(Text(f"left out: {clean(file.path)}: {file.reason}", style="yellow"))
    console.print(Text(f"the whole report: {clean(page)}"), soft_wrap=True)


def _words(cell: Cell, notes: dict[str, int]) -> str:
    shown = []
    for entry in cell.entries:
        value = f"{entry.text} [{notes[entry.reason]}]" if entry.reason else entry.text
        labelled = entry.label and entry.label not in ("before", "after")
        shown.append(f"{entry.label} {value}" if labelled else value)
    pair = any(entry.label == "before" for entry in cell.entries)
    return " → ".join(shown) if pair else "\n".join(shown)
