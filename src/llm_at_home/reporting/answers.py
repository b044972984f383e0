"""The browser of answers: questions, answers and judgments side by side, on a page of its own beside the report."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.reporting import facts
from llm_at_home.reporting.load import Loaded, Run

PAGE = "answers.html"
_ANSWERS, _JUDGMENTS = "answers.jsonl", "judgments.jsonl"
#: What a damaged file can hold in the place of a row.
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError)


@dataclass(frozen=True)
class Judgment:
    """What a judge said of an answer, or of it and another: ``verdict`` in a word or two, ``text`` in full."""

    judge: str
    verdict: str
    text: str


@dataclass
class Answer:
    """One run's answer to one question: its turns, and the judgments on each."""

    run: str
    turns: list[str]
    judgments: dict[int, list[Judgment]] = field(default_factory=dict)


@dataclass
class Asked:
    """One question with the answers of every run that was asked."""

    question_id: int
    category: str
    turns: list[str]
    references: list[str]
    answers: list[Answer] = field(default_factory=list)


def collect(loaded: Loaded) -> list[Asked]:
    """The questions that a judge has seen answers to, with what it said; what cannot be read is left out."""
    places = {run.record.config_hash: run for run in loaded.runs if run.record.task == "infer"}
    judged = [r for r in loaded.runs if r.record.task == "evaluate" and facts.evaluation(r.record) == "judge"]
    runs: dict[Path, tuple[str, Any]] = {}
    for judge in judged:
        folder = _folder(judge, places)
        if folder is not None:
            runs.setdefault(folder, (_label(judge), judge))
    asked: dict[tuple[str, int], Asked] = {}
    for folder, (label, judge) in sorted(runs.items(), key=lambda item: item[1][0]):
        source, questions = _questions(judge)
        found = {row["question_id"]: row for row in _rows(folder / _ANSWERS)}
        own = [one for one in judged if _folder(one, places) == folder]
        told = _judgments(own, set(found))
        for question_id, row in found.items():
            try:
                turns = [str(turn) for turn in row["choices"][0]["turns"]]
                question = questions.get(question_id)
                entry = asked.setdefault(
                    (source, question_id),
                    Asked(
                        question_id,
                        str(row.get("category") or (question.category if question else "")),
                        list(question.turns) if question else [],
                        list(question.reference or []) if question else [],
                    ),
                )
                entry.answers.append(Answer(label, turns, told.get(question_id, {})))
            except _UNREADABLE:
                continue
    return [asked[key] for key in sorted(asked)]


def write(loaded: Loaded, out: Path, environment: Any) -> Path | None:
    """Write the page into ``out`` and return its path, or None where no judge has read an answer."""
    path = out / PAGE
    path.unlink(missing_ok=True)
    asked = collect(loaded)
    if not asked:
        return None
    script = environment.get_template("answers.js.jinja").render()
    page = environment.get_template("answers.html.jinja").render(
        asked=asked,
        runs=sorted({answer.run for one in asked for answer in one.answers}),
        categories=sorted({one.category for one in asked if one.category}),
        # Only this script may run, whatever an answer smuggles in.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    path.write_text(page, encoding="utf-8")
    return path


def _folder(judge: Run, places: dict[str, Run]) -> Path | None:
    """Where the answers lie that were judged: a record found here, or the folder that was named then."""
    ran = places.get(facts.subject_hash(judge.record) or "")
    folders = [ran.path.parent] if ran else []
    folders += [Path(str(facts.at(judge.record.subject, "folder")))] if facts.at(judge.record.subject, "folder") else []
    return next((folder for folder in folders if (folder / _ANSWERS).is_file()), None)


def _label(judge: Run) -> str:
    words = [facts.model(judge.record), *facts.quant_words(judge.record)]
    about = facts.about(judge.record)
    path, seed = facts.at(about, "adapter_path"), facts.at(about, "seed")
    words += [facts.path_tail(path)] if path else []
    words += [f"seed {seed}"] if seed else []
    return " · ".join(words)


def _questions(judge: Run) -> tuple[str, dict[int, Any]]:
    from llm_at_home.data.questions import load_questions

    group = facts.at(judge.record.config, "questions") or facts.at(facts.about(judge.record), "questions") or {}
    source = str(facts.at(group, "source"))
    try:
        loaded = load_questions(source, path=facts.at(group, "path"), references=_references(judge))
    except (Refusal, OSError, TypeError):
        return source, {}
    return source, {question.question_id: question for question in loaded}


def _references(judge: Run) -> str:
    named = facts.at(judge.record.config, "judge", "references") or facts.at(judge.record.provenance, "references")
    return str(named or "gpt-4")


def _judgments(judges: Iterable[Run], wanted: set[int]) -> dict[int, dict[int, list[Judgment]]]:
    told: dict[int, dict[int, list[Judgment]]] = {}
    for judge in judges:
        for row in _rows(judge.path.parent / _JUDGMENTS):
            try:
                if row["question_id"] in wanted:
                    turns = told.setdefault(row["question_id"], {})
                    turns.setdefault(int(row["turn"]), []).extend(_read(row))
            except _UNREADABLE:
                continue
    return told


def _read(row: dict[str, Any]) -> list[Judgment]:
    judge = facts.clean(row["judge"][0])
    which = [f"{name} {row[name] + 1}" for name in ("sample", "repeat") if row.get(name)]
    after = f", {', '.join(which)}" if which else ""
    if "model" in row:
        missing = f"no score: {facts.clean(row.get('missing'))}"
        return [
            Judgment(
                judge, (missing if row["score"] == -1 else f"{row['score']:.4g} of 10") + after, str(row["judgment"])
            )
        ]
    words = {"model_1": "wins", "model_2": "loses", "tie": "ties"}
    return [
        Judgment(
            judge,
            f"{words.get(row[f'{order}_winner'], 'no verdict')} against {facts.clean(row['model_2'])}, "
            f"standing {place}{after}",
            str(row[f"{order}_judgment"]),
        )
        for place, order in (("first", "g1"), ("second", "g2"))
    ]


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; a broken line costs itself alone."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("question_id"), int):
            rows.append(row)
    return rows
