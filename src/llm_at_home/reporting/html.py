"""The page: one self-contained file, drawn by ``report.html.jinja`` with every text escaped, and its figures' files."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llm_at_home.reporting import answers, figuredata, svgfile
from llm_at_home.reporting.cells import Column
from llm_at_home.reporting.claims import section as claims
from llm_at_home.reporting.facts import clean
from llm_at_home.reporting.load import Loaded
from llm_at_home.reporting.overview import Overview
from llm_at_home.reporting.sections import Figure, Part

FIGURES = "figures"


def write(parts: Sequence[Part], overview: Overview, loaded: Loaded, out: Path) -> Path:
    """Write ``index.html`` into ``out``, its links relative to it, and each figure's SVG and CSV below it.

    Returns:
        the page's path.
    """
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

    figures = [figure for part in parts for section in part.sections for figure in section.figures]
    drawings = {figure.key: _draw(environment, figure) for figure in figures}
    _write_figures(figures, drawings, environment, out / FIGURES)
    script = environment.get_template("sort.js.jinja").render()
    page = environment.get_template("report.html.jinja").render(
        parts=parts,
        drawings=drawings,
        answers=answers.PAGE if answers.write(loaded, out, environment) else None,
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


def _draw(environment: Any, figure: Figure) -> Any:
    return environment.get_template(f"{figure.kind}.svg.jinja").module.draw(figure)


def _write_figures(figures: Sequence[Figure], drawings: dict[str, Any], environment: Any, folder: Path) -> None:
    # A figure that has lost its records must not live on as an old file.
    for old in (*folder.glob("*.svg"), *folder.glob("*.csv")):
        old.unlink()
    if not figures:
        return
    folder.mkdir(exist_ok=True)
    sources = [environment.loader.get_source(environment, name)[0] for name in ("colours.css", "figures.css")]
    for figure in figures:
        svgfile.write(str(drawings[figure.key]), "\n".join(sources), folder / f"{figure.key}.svg")
        figuredata.write(figure.data, folder / f"{figure.key}.csv")


def _groups(columns: Sequence[Column]) -> list[tuple[str, int]]:
    return [(name, len(list(members))) for name, members in groupby(columns, key=lambda column: column.group)]


def _starts_group(columns: Sequence[Column], index: int) -> bool:
    return index == 0 or columns[index].group != columns[index - 1].group
