"""The paper's Tables II and IV: people's grades here beside the published ones."""

from __future__ import annotations

from typing import Any

from llm_at_home.human.means import grade_name
from llm_at_home.records.schema import Reading
from llm_at_home.reporting import facts, published
from llm_at_home.reporting.cells import Cell, Column, Entry, Row, Table, number, text, unknown
from llm_at_home.reporting.load import Loaded, Run
from llm_at_home.reporting.trained import Trained

NOBODY = "nobody has graded this here yet: make rate RUNS=..., then make study"
Scores = dict[tuple[str, str], list[tuple[Run, Reading]]]
_UNASKED = "the study did not ask this question"
_UNJUDGED = "no judge has scored this on MT-bench here yet: python evaluate.py judge=... answers=RUN_FOLDER"
_UNPUBLISHED = "not published"


def tables(loaded: Loaded) -> tuple[Table, Table]:
    """Tables II and IV, a row for each published one; where there was no study ours are unknown with the reason."""
    studies = [run for run in loaded.runs if run.record.task == "human"]
    judged = [
        run
        for run in loaded.runs
        if run.record.task == "evaluate" and facts.evaluation(run.record) == "judge" and run.record.status == "ok"
    ]
    scores = _scores(judged, Trained(loaded))
    return _table(False, studies, scores), _table(True, studies, scores)


def _table(tuned: bool, studies: list[Run], scores: Scores) -> Table:
    printed = published.grades_table(tuned)
    questions = list(printed["rows"][0]["grades"])
    columns = [Column("method", "Method", kind="text")]
    for question in (*questions, None):
        name = f"question {question}" if question else "mean"
        columns.append(Column(f"grade_{question or 'mean'}", "ours", name, better="higher"))
        columns.append(Column(f"published_{question or 'mean'}", "published", name))
    if tuned:
        columns.append(Column("mt_bench", "ours", "MT-bench, 1 to 10", "many", better="higher"))
        columns.append(Column("mt_bench_published", "published, GPT-4", "MT-bench, 1 to 10"))
    rows = tuple(_row(row, columns, questions, tuned, studies, scores) for row in printed["rows"])
    return Table(
        "table-4" if tuned else "table-2",
        "Table IV: people’s grades, fine-tuned" if tuned else "Table II: people’s grades, inference",
        f"Mean grades from 1 (useless) to 5 (perfect). Published: {printed['workload']}. Ours, where there are any: "
        "from a blind study of the runs that its record names.",
        tuple(columns),
        rows,
    )


def _row(
    printed: dict[str, Any],
    columns: list[Column],
    questions: list[int],
    tuned: bool,
    studies: list[Run],
    scores: Scores,
) -> Row:
    adapter = printed.get("adapter", "none")
    study, label = _graded(studies, printed["quant"], adapter)
    cells = {"method": text(printed["name"], published.SOURCE)}
    by_key = {column.key: column for column in columns}
    for question in (*questions, None):
        key = question or "mean"
        cells[f"grade_{key}"] = Cell((_ours(by_key[f"grade_{key}"], study, label, question),))
        value = printed["grades"][question] if question else printed["mean"]
        cells[f"published_{key}"] = Cell((_published(value),))
    if tuned:
        column = by_key["mt_bench"]
        found = [
            column.entry(reading, run.path, facts.clean(reading.method))
            for run, reading in scores.get((printed["quant"], adapter), [])
        ]
        cells["mt_bench"] = Cell(tuple(found) or (unknown(_UNJUDGED),))
        cells["mt_bench_published"] = Cell((_published(printed["mt_bench"]),))
    return Row(cells, study.path if study else published.SOURCE, (), study)


def _graded(studies: list[Run], quant: str, adapter: str) -> tuple[Run | None, str]:
    """The newest study that holds this method, and the name that it has there."""
    for study in sorted(studies, key=lambda run: run.when, reverse=True):
        for model in facts.at(study.record.config, "models") or ():
            same = facts.at(model, "adapter") == adapter or (adapter == "none" and not facts.at(model, "adapter"))
            if facts.at(model, "quant") == quant and same:
                return study, str(facts.at(model, "label"))
    return None, ""


def _ours(column: Column, study: Run | None, label: str, question: int | None) -> Entry:
    if study is None:
        return unknown(NOBODY)
    reading = study.record.quality.get(grade_name(label, question))
    return column.entry(reading, study.path, missing=_UNASKED)


def _scores(judged: list[Run], trained: Trained) -> Scores:
    """The judges' mean scores on MT-bench, by quantization and adapter."""
    found: Scores = {}
    for run in judged:
        record, about = run.record, facts.about(run.record)
        reading = record.quality.get("judge_score_mean")
        if reading and facts.name_at(about, "questions", "name") == "mt_bench":
            adapter = trained.adapter(record.task, record.config, record.subject)
            found.setdefault((facts.quant(record), adapter), []).append((run, reading))
    return found


def _published(value: float | None) -> Entry:
    if value is None:
        return unknown(_UNPUBLISHED)
    return Entry(number(value, 2), float(value), detail="as published", source=published.SOURCE)
