"""The page: one self-contained file, drawn by ``report.html.jinja`` with every text escaped."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

from llm_at_home.reporting import answers
from llm_at_home.reporting.cells import Column, Table
from llm_at_home.reporting.claims import section as claims
from llm_at_home.reporting.facts import clean
from llm_at_home.reporting.figures import charts
from llm_at_home.reporting.load import Loaded
from llm_at_home.reporting.overview import Overview
from llm_at_home.reporting.radar import radars
from llm_at_home.reporting.ranks import rank_maps
from llm_at_home.reporting.scatter import plots


def write(tables: Sequence[Table], overview: Overview, loaded: Loaded, out: Path) -> Path:
    """Write ``index.html`` into ``out``, its links relative to it, and return its path."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("llm_at_home.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def href(source: Path) -> str:
        # "./" keeps a folder called "javascript:" a folder.
        return "./" + quote(Path(os.path.relpath(source, out)).as_posix())

    script = environment.get_template("sort.js.jinja").render()
    page = environment.get_template("report.html.jinja").render(
        tables=tables,
        charts={table.key: charts(table) for table in tables},
        plots={table.key: plots(table) for table in tables},
        radars={table.key: radars(table) for table in tables},
        answers=answers.PAGE if answers.write(loaded, out, environment) else None,
        rank_maps={table.key: rank_maps(table) for table in tables},
        overview=overview,
        claims=claims.draw(loaded, environment, href),
        left_out=loaded.left_out,
        href=href,
        groups=_groups,
        starts=_starts_group,
        bare=lambda entry: replace(entry, label=""),
        clean=clean,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        # Only this script may run, whatever a record smuggles in.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    path = out / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _groups(columns: Sequence[Column]) -> list[tuple[str, int]]:
    return [(name, len(list(members))) for name, members in groupby(columns, key=lambda column: column.group)]


def _starts_group(columns: Sequence[Column], index: int) -> bool:
    return index == 0 or columns[index].group != columns[index - 1].group
