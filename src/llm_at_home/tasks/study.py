"""Statistics of a rating study: ``python -m llm_at_home.tasks.study STUDY [--judge RUN ...] [--fidelity RUN ...]``."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.human.study import GradeRow, Study
from llm_at_home.records import provenance, store
from llm_at_home.records.hashing import config_hash, package_versions
from llm_at_home.records.schema import Record
from llm_at_home.records.tracking import Tracker

TASK = "human"
DEFAULT_MLFLOW = "sqlite:///mlflow.db"
EXPERIMENT = "llm-at-home"


def main(argv: Sequence[str] | None = None) -> int:
    """Count the grades, print the tables and leave a record; 2 when there is nothing to count."""
    parser = argparse.ArgumentParser(prog="python -m llm_at_home.tasks.study", description=__doc__)
    parser.add_argument("study", help="the folder that `make rate` keeps grades in")
    parser.add_argument("--judge", nargs="*", default=[], metavar="RUN", help="runs of evaluate.py task=judge")
    parser.add_argument("--fidelity", nargs="*", default=[], metavar="RUN", help="runs of evaluate.py task=fidelity")
    parser.add_argument("--mlflow", default=DEFAULT_MLFLOW, help="a tracking URI, or none (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        study = Study(arguments.study)
        try:
            print(_run(study, arguments))
        finally:
            study.close()
    except Refusal as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    return 0


def _run(study: Study, arguments: argparse.Namespace) -> str:
    """The tables; ``record.json``, ``tables.md``, ``grades.csv`` and ``figures.csv`` lie in the study's folder then."""
    from llm_at_home.reporting import study as pages

    folder = Path(arguments.study)
    rows = study.grades()
    record = Record(TASK, config=_config(study, arguments), provenance=provenance.collect())
    grades = hashlib.sha256(json.dumps([dataclasses.astuple(row) for row in rows]).encode()).hexdigest()
    record.provenance |= {"study": study.fingerprint, "grades": grades}
    record.config_hash = config_hash(
        record.config, {"study": study.fingerprint, "grades": grades, "packages": package_versions(("krippendorff",))}
    )
    _fill(record, study, rows, arguments)
    tracker = None
    if arguments.mlflow != "none":
        tracker = Tracker(arguments.mlflow, EXPERIMENT, f"{TASK} {folder.name}")
        tracker.open(record.config, {"task": TASK})
    pages.write_grades(rows, folder / "grades.csv")
    pages.write_figures(record, folder / "figures.csv")
    text = pages.markdown(record)
    (folder / "tables.md").write_text(text, encoding="utf-8")
    store.save(record, folder)
    if tracker is not None:
        tracker.close(record, folder)
        if tracker.problem:
            record.notes.append(tracker.problem)
            store.save(record, folder)
    return f"{text}\nkept in {folder}: record.json, tables.md, grades.csv, figures.csv"


def _config(study: Study, arguments: argparse.Namespace) -> dict[str, Any]:
    models = [
        {
            "label": model.label,
            "quant": (model.config.get("quant") or {}).get("name", ""),
            "adapter": model.adapter,
            "folder": model.folder,
            "config_hash": model.config_hash,
        }
        for model in study.models()
    ]
    return {
        "models": models,
        "questions": [question.question_id for question in study.questions()],
        "raters": study.raters,
        "seed": study.seed,
        "judge": list(arguments.judge),
        "fidelity": list(arguments.fidelity),
    }


def _fill(record: Record, study: Study, rows: Sequence[GradeRow], arguments: argparse.Namespace) -> None:
    """Quality, counts and notes."""
    from llm_at_home.human.agreement import ALPHA, alpha_reading, bias_readings
    from llm_at_home.human.compared import read_fidelity, read_judges
    from llm_at_home.human.correlation import correlation_readings
    from llm_at_home.human.grades import Grades
    from llm_at_home.human.means import mean_readings
    from llm_at_home.human.votes import vote_readings

    models, questions = study.models(), record.config["questions"]
    judges = read_judges(arguments.judge, models, questions)
    fidelity = read_fidelity(arguments.fidelity, models)
    grades = Grades.of(rows, study.raters, [model.label for model in models], questions)
    record.quality |= mean_readings(grades)
    record.quality[ALPHA] = alpha_reading(grades)
    record.quality |= bias_readings(grades)
    record.quality |= vote_readings(grades, judges)
    record.quality |= correlation_readings(grades, judges, fidelity)
    by_rater = grades.known.sum((1, 2))
    each = len(models) * len(questions)
    record.counts |= {
        "models": len(models),
        "questions": len(questions),
        "questions_left_out": study.left_out,
        "raters": study.raters,
        "raters_without_grades": int((by_rater == 0).sum()),
        "raters_unfinished": int(((by_rater > 0) & (by_rater < each)).sum()),
        "grades_expected": study.raters * each,
        "grades": int(by_rater.sum()),
        "grades_missing": study.raters * each - int(by_rater.sum()),
        "comments": sum(bool(row.comment) for row in rows),
    }
    for judge in judges:
        record.counts[f"answers_without_score/{judge.name}"] = judge.missing
    if int((by_rater > 0).sum()) == 1:
        record.notes.append("one rater has graded: there are no intervals, since nothing tells how others would grade")


if __name__ == "__main__":
    sys.exit(main())
