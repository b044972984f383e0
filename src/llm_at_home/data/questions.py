"""Question sets in MT-bench's format: two turns a question, a category, reference answers for some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_at_home.data.jsonl import BadLine, parse_lines, read_bytes, sha256_of, summary, text_fault
from llm_at_home.errors import Refusal
from llm_at_home.paths import cache_dir

SOURCES = ("home_bench", "mt_bench", "path")
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
HOME_BENCH = Path(__file__).parent / "home_bench" / "question.jsonl"
TURNS = 2


@dataclass(frozen=True)
class Question:
    """Two turns to put to a model, the second after its reply to the first.

    ``reference`` holds an answer to each turn, "" where there is none; None where both lack one.
    """

    question_id: int
    category: str
    turns: list[str]
    reference: list[str] | None = None


def mt_bench_folder() -> Path:
    """Where ``python -m llm_at_home.data fetch`` puts the published files."""
    return cache_dir() / "mt_bench"


def question_files(source: str, *, path: str | Path | None = None, references: str = "gpt-4") -> list[Path]:
    """The files that a question set is read from: the questions, then the references if they lie apart.

    Raises:
        Refusal: for an unknown source, a missing path, or MT-bench files that were not fetched.
    """
    if source == "home_bench":
        return [HOME_BENCH]
    if source == "mt_bench":
        folder = mt_bench_folder()
        files = [folder / "question.jsonl", folder / "reference_answer" / f"{references}.jsonl"]
        if not files[0].exists():
            raise Refusal("the MT-bench questions are not here yet: run `python -m llm_at_home.data fetch`")
        if not files[1].exists():
            known = sorted(file.stem for file in files[1].parent.glob("*.jsonl"))
            raise Refusal(f"no MT-bench references {references!r}; choose one of {', '.join(known) or 'none'}")
        return files
    if source == "path":
        if not path:
            raise Refusal("questions from your own file need questions.path=FILE.jsonl")
        return [Path(path).expanduser()]
    raise Refusal(f"no question set {source!r}; choose one of {', '.join(SOURCES)}")


def questions_hash(source: str, *, path: str | Path | None = None, references: str = "gpt-4") -> str:
    """The SHA-256 (hex) over the bytes of a question set's files; no heavy import."""
    return sha256_of(read_bytes(file) for file in question_files(source, path=path, references=references))


def questions_of(options: Mapping[str, Any], limit: int | None = None) -> list[Question]:
    """The questions that the group ``questions`` of a configuration names.

    Raises:
        Refusal: as :func:`load_questions`, and for ids that are no list.
    """
    ids = options["ids"]
    if ids is not None and (isinstance(ids, str) or not isinstance(ids, Sequence)):
        raise Refusal(f"questions.ids={ids} is no list: give questions.ids=[{ids}]")
    references = options["references"] or "gpt-4"
    return load_questions(options["source"], path=options["path"], ids=ids, limit=limit, references=references)


def load_questions(
    source: str,
    *,
    path: str | Path | None = None,
    ids: Sequence[int] | None = None,
    limit: int | None = None,
    references: str = "gpt-4",
) -> list[Question]:
    """The questions of a set, in the order of its file.

    Args:
        source: ``home_bench``, ``mt_bench`` or ``path``.
        path: the file of ``path``.
        ids: keep these ``question_id``, in this order.
        limit: then keep the first N.
        references: whose answers go with MT-bench's math, reasoning and coding: ``gpt-4`` (the published
            ones) or ``gpt-4-0125-preview``. As in FastChat, the short ones in its question file are not used.

    Raises:
        Refusal: for a missing file, an unknown id, or bad lines, each with its number.
    """
    files = question_files(source, path=path, references=references)
    questions = _read_questions(files[0])
    if source == "mt_bench":
        answers = _read_references(files[1])
        questions = [Question(q.question_id, q.category, q.turns, answers.get(q.question_id)) for q in questions]
    if ids is not None:
        by_id = {q.question_id: q for q in questions}
        if missing := [i for i in ids if i not in by_id]:
            raise Refusal(f"{files[0]} has no question {', '.join(map(str, missing))}")
        questions = [by_id[i] for i in ids]
    if limit is not None and limit < 1:
        raise Refusal(f"limit={limit} leaves no question; give at least 1")
    return questions[:limit]


def _texts_fault(value: object, name: str) -> str | None:
    if not isinstance(value, list) or len(value) != TURNS:
        return f"{name} is no list of {TURNS}"
    for place, text in enumerate(value, start=1):
        if fault := text_fault(text):
            return f"{name} {place} {fault}"
    return None


def _question_fault(row: Any) -> str | None:
    if not isinstance(row, dict):
        return "no JSON object"
    if not isinstance(row.get("question_id"), int) or isinstance(row["question_id"], bool):
        return "question_id is no whole number"
    if fault := text_fault(row.get("category")):
        return f"category {fault}"
    if fault := _texts_fault(row.get("turns"), "turns"):
        return fault
    return _reference_fault(row.get("reference"))


def _reference_fault(value: Any) -> str | None:
    # Looser than the turns: some of the published references are "" for one turn.
    if value is None or (isinstance(value, list) and len(value) <= TURNS and all(isinstance(t, str) for t in value)):
        return None
    return f"reference is no list of up to {TURNS} strings"


def _reference(value: list[str] | None) -> list[str] | None:
    return [*value, *[""] * (TURNS - len(value))] if value and any(t.strip() for t in value) else None


def _read_questions(file: Path) -> list[Question]:
    questions: dict[int, Question] = {}
    bad: list[BadLine] = []
    for number, row, reason in parse_lines(read_bytes(file)):
        reason = reason or _question_fault(row)
        if reason is None and row["question_id"] in questions:
            reason = f"question_id {row['question_id']} was there before"
        if reason is not None:
            bad.append(BadLine(number, reason))
            continue
        question = Question(row["question_id"], row["category"], row["turns"], _reference(row.get("reference")))
        questions[question.question_id] = question
    if bad:
        raise Refusal(f"{file} has bad lines: {summary(bad)}")
    if not questions:
        raise Refusal(f"{file} holds no question")
    return list(questions.values())


def _read_references(file: Path) -> dict[int, list[str]]:
    """Answers by question id, out of FastChat's answer format: ``choices[0].turns``."""
    answers: dict[int, list[str]] = {}
    for number, row, reason in parse_lines(read_bytes(file)):
        try:
            if reason is None:
                turns = row["choices"][0]["turns"]
                reason = _texts_fault(turns, "turns")
                answers[row["question_id"]] = turns
        except (KeyError, IndexError, TypeError):
            reason = "no question_id with choices[0].turns"
        if reason is not None:
            raise Refusal(f"{file} has bad lines: {BadLine(number, reason)}")
    return answers
