"""Writes the tables of README and docs from committed records: ``python -m llm_at_home.reporting.readme README.md``.

A table stands between ``<!-- table: KEY FOLDER COLUMN ... -->`` and ``<!-- end -->``; what is between is replaced.
``COLUMN:interval`` shows each value with its 95 % interval. FOLDER is relative to the project's root. The ledger of
claims stands between ``<!-- claims: FOLDER ... -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection
from pathlib import Path

from llm_at_home.errors import Refusal
from llm_at_home.reporting import load, tables
from llm_at_home.reporting.cells import EN_DASH, Cell, Column, Table
from llm_at_home.reporting.claims import page as claims

INTERVAL = ":interval"
BLOCK = re.compile(r"(<!-- (?P<kind>table|claims): (?P<words>[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str, root: Path, page: str = "README.md") -> str:
    """The text with every table made anew from the records that it names, below ``root``.

    Args:
        text: of the page.
        root: the project's folder.
        page: where the text stands, relative to ``root``; links in it are relative to that.

    Raises:
        Refusal: for a table or column that does not exist, or a malformed claim.
    """

    def made(match: re.Match[str]) -> str:
        words = match["words"].split()
        text = claims.render(words, root, root / page) if match["kind"] == "claims" else _block(words, root)
        return match[1] + text + match[4]

    return BLOCK.sub(made, text)


def _block(words: list[str], root: Path) -> str:
    key, folder, *names = words
    made = {table.key: table for table in tables.build(load.load([root / folder]))}
    if key not in made:
        raise Refusal(f"the records in {folder} make no table {key!r}, only {', '.join(made)}")
    columns = {column.key: column for column in made[key].columns}
    plain = [name.removesuffix(INTERVAL) for name in names]
    missing = [name for name in plain if name not in columns]
    if missing:
        raise Refusal(f"the table {key} has no column {missing[0]!r}; it has {', '.join(columns)}")
    intervals = {name.removesuffix(INTERVAL) for name in names if name.endswith(INTERVAL)}
    return markdown(made[key], [columns[name] for name in plain], intervals)


def markdown(table: Table, columns: list[Column], intervals: Collection[str] = ()) -> str:
    """The chosen columns as a Markdown table, a line a row; ``intervals`` names the columns that show theirs."""
    lines = [[_title(column) for column in columns], ["---"] * len(columns)]
    lines += [[_text(row.cells[column.key], column.key in intervals) for column in columns] for row in table.rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _title(column: Column) -> str:
    return f"{column.title} ({column.unit})" if column.unit else column.title


def _text(cell: Cell, interval: bool) -> str:
    said = [entry.text if entry.value is not None else EN_DASH for entry in cell.entries]
    if interval:
        ends = [f" [{entry.interval.replace(EN_DASH, ', ')}]" if entry.interval else "" for entry in cell.entries]
        said = [value + end for value, end in zip(said, ends, strict=True)]
    return " → ".join(said).replace("|", "\\|")


def _root(path: Path) -> Path:
    """The project's folder, for a page of any depth below it."""
    above = path.resolve().parents
    return next((folder for folder in above if (folder / "pyproject.toml").is_file()), above[0])


def main(argv: list[str] | None = None) -> int:
    """Rewrite the tables of the files given, README.md by default."""
    for name in (argv if argv is not None else sys.argv[1:]) or ["README.md"]:
        path = Path(name)
        try:
            root = _root(path)
            where = path.resolve().relative_to(root).as_posix()
            path.write_text(render(path.read_text(encoding="utf-8"), root, where), encoding="utf-8")
        except Refusal as refusal:
            print(f"refused: {refusal}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
