"""Tables and figures made from records alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

DEFAULT_FOLDERS = ("multirun", "results")


def write_report(
    folders: Sequence[Path | str] = DEFAULT_FOLDERS, out: Path | str = "reports", prices: Path | str | None = None
) -> Path:
    """Write ``index.html``, a CSV file a table and each figure's SVG and CSV into ``out``, and print every run.

    Args:
        folders: where to look for ``record.json``; a default folder that does not exist is passed over.
        out: the folder to write to; made when missing.
        prices: a file like ``prices.yaml`` with the user's own; None for the shipped one.

    Returns:
        the page's path.

    Raises:
        Refusal: for a named folder that does not exist, or when no record is found, or for prices that make no sense.
    """
    from llm_at_home.reporting import csvfile, html, load, overview, sections, tables, terminal
    from llm_at_home.reporting import prices as price_list

    out = Path(out)
    loaded = load.load(folders)
    known = price_list.load(prices or price_list.SHIPPED)
    made = tables.build(loaded)
    parts = sections.build(loaded, made, known)
    summary = overview.summarize(loaded)
    out.mkdir(parents=True, exist_ok=True)
    for key in (*tables.KEYS, *sections.KEYS):
        # A table that has lost its last row must not live on as an old file.
        (out / f"{key}.csv").unlink(missing_ok=True)
    for table in (section.table for part in parts for section in part.sections):
        if table:
            csvfile.write(table, out)
    page = html.write(parts, summary, loaded, out)
    terminal.show(made, loaded, page)
    return page
