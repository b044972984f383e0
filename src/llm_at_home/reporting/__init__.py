"""Tables and figures made from records alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

DEFAULT_FOLDERS = ("multirun", "results")


def write_report(folders: Sequence[Path | str] = DEFAULT_FOLDERS, out: Path | str = "reports") -> Path:
    """Write ``index.html`` and a CSV file a table into ``out``, print the tables, and return the page's path.

    Args:
        folders: where to look for ``record.json``; a default folder that does not exist is passed over.
        out: the folder to write to; made when missing.

    Raises:
        Refusal: for a named folder that does not exist, or when no record is found.
    """
    from llm_at_home.reporting import csvfile, html, load, overview, tables, terminal

    out = Path(out)
    loaded = load.load(folders)
    made = tables.build(loaded)
    summary = overview.summarize(loaded)
    out.mkdir(parents=True, exist_ok=True)
    for key in tables.KEYS:
        # A table that has lost its last row must not live on as an old file.
        (out / f"{key}.csv").unlink(missing_ok=True)
    for table in made:
        csvfile.write(table, out)
    page = html.write(made, summary, loaded, out)
    terminal.show(made, loaded, page)
    return page
