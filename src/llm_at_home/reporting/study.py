"""What a study's record comes to: the paper's Tables II and IV beside the published figures, and CSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_at_home.human.agreement import ALPHA, bias_name
from llm_at_home.human.correlation import KINDS
from llm_at_home.human.means import difference_name, grade_name
from llm_at_home.human.study import GradeRow
from llm_at_home.human.votes import TIES
from llm_at_home.records.schema import Reading, Record
from llm_at_home.reporting import published
from llm_at_home.reporting.csvfile import safe
from llm_at_home.reporting.facts import clean

# More questions than this do not stand side by side on a page.
COLUMNS = 8
_ESCAPED = str.maketrans({character: f"\\{character}" for character in r"\`*_[]<>|"})


def markdown(record: Record) -> str:
    """All tables and figures of a study as Markdown, from its record alone."""
    models = record.config["models"]
    parts = [_counted(record)]
    for title, own in (
        ("Table II: people's grades of the bases", [m for m in models if not _is_tuned(m)]),
        ("Table IV: people's grades of the fine-tuned models", [m for m in models if _is_tuned(m)]),
    ):
        if own:
            parts.append(f"## {title}\n\n" + _grades(record, own))
    parts += [
        _agreement(record),
        _votes(record),
        _correlations(record),
        _notes(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _is_tuned(model: Mapping[str, Any]) -> bool:
    return model["adapter"] not in ("none", "")


def _counted(record: Record) -> str:
    counts = record.counts
    lines = [
        f"# {counts['models']} models, {counts['questions']} questions, {counts['raters']} raters",
        f"{counts['grades']} of {counts['grades_expected']} grades; {counts['grades_missing']} are missing: "
        f"{counts['raters_without_grades']} raters have graded nothing, {counts['raters_unfinished']} a part.",
    ]
    if counts["questions_left_out"]:
        lines.append(f"{counts['questions_left_out']} questions are left out, which not every run answered whole.")
    return "\n\n".join(lines)


def _grades(record: Record, models: Sequence[Mapping[str, Any]]) -> str:
    questions = record.config["questions"]
    shown = questions if len(questions) <= COLUMNS else []
    first = record.config["models"][0]["label"]
    header = ["model", *(f"question {q}" for q in shown), "mean [95 %]", f"against {_text(first)} [95 %]"]
    rows = []
    for model in models:
        label = model["label"]
        raters = record.counts["raters"]
        cells = [_cell(record.quality[grade_name(label, q)], raters, interval=False) for q in shown]
        cells.append(_cell(record.quality[grade_name(label)], raters * len(questions)))
        against = record.quality.get(difference_name(label))
        cells.append("–" if against is None else _cell(against, raters * len(questions), sign=True))
        rows.append([_text(label), *cells])
        row = published.human_grades(model["quant"], model["adapter"]) if model["quant"] else None
        if row and sorted(row["grades"]) == sorted(questions):
            rows.append(
                [f"*published: {row['name']}*", *(f"{row['grades'][q]:g}" for q in shown), f"{row['mean']:g}", ""]
            )
    text = _table(header, rows)
    if not shown:
        text += f"\n\nThe grades of the {len(questions)} questions one by one are in figures.csv."
    return text


def _agreement(record: Record) -> str:
    rows = [
        [f"rater {rater}", _cell(record.quality[bias_name(rater)], None, sign=True)]
        for rater in range(1, record.counts["raters"] + 1)
    ]
    alpha = f"Krippendorff's alpha (ordinal): {_cell(record.quality[ALPHA], None)}"
    table = _table(["", "milder (+) or stricter (-) than the others, points [95 %]"], rows)
    return f"## Agreement of the raters\n\n{alpha}\n\n{table}"


def _votes(record: Record) -> str:
    one, other = (f"agreement_{ties}/" for ties in TIES)
    rows = []
    for who in [name.removeprefix(one) for name in record.quality if name.startswith(one)]:
        both = [record.quality[kind + who] for kind in (one, other)]
        rows.append([_text(who), *(_cell(reading, None) for reading in both), *(str(r.n or 0) for r in both)])
    header = ["raters and", "agreement with ties [95 %]", "without ties [95 %]", "votes with ties", "without ties"]
    return "## Which of two answers is better\n\n" + _table(header, rows)


def _correlations(record: Record) -> str:
    pairs = {name.split("_", 1)[1]: name for name in record.quality if name.startswith(f"{KINDS[0]}_")}
    if not pairs:
        return ""
    rows = []
    for rest in pairs:
        over, name = rest.split("/", 1)
        one, other = (record.quality[f"{kind}_{rest}"] for kind in KINDS)
        rows.append([_text(name), over, _cell(one, None), _cell(other, None), str(one.n or "–")])
    header = ["people against", "over", "Spearman's rho [95 %]", "Kendall's tau-b [95 %]", "n"]
    return "## Rank correlations\n\n" + _table(header, rows)


def _notes(record: Record) -> str:
    return "\n".join(f"- {note}" for note in record.notes)


def _cell(reading: Reading, full: int | None, *, interval: bool = True, sign: bool = False) -> str:
    """A figure as it stands in a table; with ``full``, n is shown where fewer grades than that are behind it."""
    if reading.value is None and not interval:
        return "– (n=0)"
    if reading.value is None:
        return f"unknown: {_text(reading.reason or '')}"
    form = "+.2f" if sign else ".2f"
    text = f"{reading.value:{form}}"
    if interval:
        text += " [{:{f}}, {:{f}}]".format(*reading.interval95, f=form) if reading.interval95 else " [no interval]"
    return text + (f" (n={reading.n})" if full is not None and reading.n != full else "")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(text: object) -> str:
    return clean(text).translate(_ESCAPED)


def write_figures(record: Record, path: Path) -> None:
    """Every figure of the record as CSV: name, value, interval, n, unit, method and, without a value, the reason."""
    rows = []
    for name, reading in record.quality.items():
        low, high = reading.interval95 or ("", "")
        value = "" if reading.value is None else reading.value
        rows.append([safe(name), value, low, high, reading.n, reading.unit, reading.method, safe(reading.reason or "")])
    _write(path, ["figure", "value", "low95", "high95", "n", "unit", "method", "reason"], rows)


def write_grades(rows: Sequence[GradeRow], path: Path) -> None:
    """Every rater's grade of every answer as CSV; one that is missing is a row with an empty grade."""
    header = ["rater", "position", "question_id", "model", "grade", "comment", "graded_at"]
    said = ([r.rater, r.position, r.question_id, safe(r.model), r.grade, safe(r.comment), r.graded_at] for r in rows)
    _write(path, header, said)


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
