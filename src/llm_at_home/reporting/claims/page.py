"""The ledger in Markdown, between ``<!-- claims: FOLDER ... -->`` and ``<!-- end -->`` of a page."""

from __future__ import annotations

import os
from pathlib import Path

from llm_at_home.reporting import load
from llm_at_home.reporting.claims import findings, words
from llm_at_home.reporting.claims.verdict import REFUTED, SUPPORTED, UNDECIDED, Case, Finding
from llm_at_home.reporting.load import Run

HEADS = ("claim", "source", "tested as", "effect, 95 % interval", "on")


def render(folders: list[str], root: Path, page: Path) -> str:
    """A count, and a table for each verdict.

    Args:
        folders: of records, relative to ``root``.
        root: the project's folder.
        page: the file that the text is for; links are relative to it.
    """
    found = findings(load.load([root / folder for folder in folders]))
    parts = [counted(found) + "\n"]
    for verdict in (SUPPORTED, REFUTED, UNDECIDED):
        rows = [_row(finding, page.resolve().parent) for finding in found if finding.verdict == verdict]
        if rows:
            parts += [
                f"\n## {verdict.capitalize()}\n",
                f"\n| {' | '.join(HEADS)} |\n",
                "| --- " * len(HEADS) + "|\n",
                *rows,
            ]
    return "".join(parts)


def counted(found: list[Finding]) -> str:
    """How many claims have which verdict, in a sentence."""
    said = [f"{sum(one.verdict == v for one in found)} {v}" for v in (SUPPORTED, REFUTED, UNDECIDED)]
    return f"{len(found)} claims: {', '.join(said)}."


def _row(finding: Finding, here: Path) -> str:
    claim = finding.claim
    tested = words.asked(finding) + (f". {claim.reading}" if claim.reading else "")
    effects = [_case(case, finding, here) for case in finding.cases] or [f"– {finding.reason}"]
    if finding.cases and finding.reason:
        effects.append(f"*{finding.reason}*")
    cells = (claim.claim, f"{claim.document}, {claim.place}", tested, "<br>".join(effects), words.where(finding) or "–")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _case(case: Case, finding: Finding, here: Path) -> str:
    links = " against ".join(_link(run, here) for run in case.runs)
    verdict = "" if case.verdict == finding.verdict else f" ({case.verdict})"
    reason = f": {case.reason}" if case.reason and case.reason != finding.reason else ""
    return f"{words.effect(case)}{verdict}, {links}{reason}"


def _link(run: Run, here: Path) -> str:
    return f"[{words.name(run)}]({Path(os.path.relpath(run.path.resolve(), here)).as_posix()})"
