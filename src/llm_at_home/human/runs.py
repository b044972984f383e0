"""Which answers a study shows: those of several runs to the questions that all of them answered."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_at_home.data.questions import SOURCES, Question, load_questions
from llm_at_home.errors import Refusal
from llm_at_home.records import store
from llm_at_home.records.jsonl import read_jsonl
from llm_at_home.records.schema import Record

ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Model:
    """One run whose answers are graded; ``config`` and ``config_hash`` are those of its record, where it has one.

    ``adapter`` is the name of the adapter that was trained for it, "none" for a bare base, "" where nothing tells.
    """

    label: str
    model_id: str
    folder: str
    config: dict[str, Any] = field(default_factory=dict)
    config_hash: str = ""
    adapter: str = ""


@dataclass(frozen=True)
class Material:
    """What raters see: ``answers[label][question_id]`` holds the turns of one answer.

    ``left_out`` counts the questions that some of the runs, but not all, have a whole answer to.
    """

    questions: list[Question]
    models: list[Model]
    answers: dict[str, dict[int, list[str]]]
    left_out: int = 0

    def fingerprint(self) -> str:
        """SHA-256 (hex) over every text and label, whatever the order in which the runs were named."""
        asked = sorted([q.question_id, q.category, q.turns] for q in self.questions)
        given = sorted([label, sorted(answers.items())] for label, answers in self.answers.items())
        return hashlib.sha256(json.dumps([asked, given]).encode()).hexdigest()


def read_material(
    runs: Sequence[str | Path],
    questions: str | None = None,
    ids: Sequence[int] | None = None,
    limit: int | None = None,
) -> Material:
    """Read the runs' answers and the questions that they were given.

    Args:
        runs: folders with ``answers.jsonl`` in FastChat's fields, or such files themselves; the first is the one that
            the others are compared with.
        questions: ``home_bench``, ``mt_bench`` or a file; by default what the runs' records name.
        ids: keep these questions, in this order.
        limit: then keep the first N.

    Raises:
        Refusal: when there is nothing to compare, or the runs do not belong together.
    """
    if len({str(Path(run).resolve()) for run in runs}) != len(runs):
        raise Refusal("a run is named twice: name each once")
    found = [_read_run(run) for run in runs]
    models = _labelled([model for model, _, _ in found])
    asked = _questions([(model, record) for model, _, record in found], questions)
    if ids is not None and (unknown := [i for i in ids if i not in asked]):
        raise Refusal(f"the runs were not asked question {', '.join(map(str, unknown))}: choose other --ids")
    wanted = [asked[i] for i in (ids if ids is not None else asked)]
    whole = {
        model.label: {q.question_id: rows[q.question_id] for q in wanted if _is_whole(rows.get(q.question_id), q)}
        for model, (_, rows, _) in zip(models, found, strict=True)
    }
    kept = [q for q in wanted if all(q.question_id in answers for answers in whole.values())]
    some = [q for q in wanted if any(q.question_id in answers for answers in whole.values())]
    if ids is not None and len(kept) < len(wanted):
        lacking = ", ".join(str(q.question_id) for q in wanted if q not in kept)
        raise Refusal(f"not every run has a whole answer to question {lacking}: choose other --ids")
    if not kept:
        raise Refusal("there is no question that every run has a whole answer to")
    shown = kept[:limit]
    answers = {label: {q.question_id: rows[q.question_id] for q in shown} for label, rows in whole.items()}
    return Material(shown, models, answers, left_out=len(some) - len(kept))


def _read_run(run: str | Path) -> tuple[Model, dict[int, list[str]], Record | None]:
    path = Path(run).expanduser()
    if not path.is_file() and not (path / ANSWERS).is_file():
        path = store.run_folder(path)
    file = path if path.is_file() else path / ANSWERS
    if not file.is_file():
        raise Refusal(f"{path} holds no {ANSWERS}: name the folder of an inference run")
    model_ids = set()
    answers = {}
    for row in read_jsonl(file):
        try:
            model_ids.add(str(row["model_id"]))
            answers[int(row["question_id"])] = [str(turn) for turn in row["choices"][0]["turns"]]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise Refusal(
                f"{file}, question {row.get('question_id')}: no answer in FastChat's format: {error!r}"
            ) from None
    if len(model_ids) != 1:
        raise Refusal(f"{file} holds answers of {len(model_ids)} models: one run is one model")
    record = store.load(path) if path.is_dir() and (path / store.RECORD).is_file() else None
    name = model_ids.pop()
    model = Model(name, name, str(path.resolve()))
    if record is not None:
        model = Model(name, name, str(path.resolve()), record.config, record.config_hash, _adapter(record))
    return model, answers, record


def _adapter(record: Record) -> str:
    """The adapter's name as its training run has it; what the folder is called where that run cannot be read."""
    path = record.config.get("adapter_path")
    if not path:
        return "none"
    try:
        return str(store.load(path).config["adapter"]["name"])
    except (Refusal, KeyError, TypeError):
        return Path(path).name


def _labelled(models: Sequence[Model]) -> list[Model]:
    """With the folder's name where two runs are of one model, as in a comparison of two seeds."""
    times = Counter(model.model_id for model in models)
    labels = [m.model_id if times[m.model_id] == 1 else f"{m.model_id} ({Path(m.folder).name})" for m in models]
    if len(set(labels)) < len(labels):
        labels = [f"{model.model_id} ({model.folder})" for model in models]
    return [
        Model(label, m.model_id, m.folder, m.config, m.config_hash, m.adapter)
        for label, m in zip(labels, models, strict=True)
    ]


def _questions(runs: Sequence[tuple[Model, Record | None]], chosen: str | None) -> dict[int, Question]:
    """All questions that the runs can have been asked, by id.

    Raises:
        Refusal: when nothing says which they were, or one id stands for two questions.
    """
    sets = {model.folder: _question_set(model, record, chosen) for model, record in runs}
    asked: dict[int, Question] = {}
    for folder, questions in sets.items():
        for question in questions:
            known = asked.setdefault(question.question_id, question)
            if known.turns != question.turns:
                raise Refusal(f"question {question.question_id} of {folder} is another one than the other runs'")
    return asked


def _question_set(model: Model, record: Record | None, chosen: str | None) -> list[Question]:
    if chosen is not None:
        return load_questions(chosen) if chosen in SOURCES else load_questions("path", path=chosen)
    named: Mapping[str, Any] | None = record.config.get("questions") if record is not None else None
    if not named:
        raise Refusal(f"no record says which questions {model.folder} answers: name them with --questions")
    references = named.get("references") or "gpt-4"
    return load_questions(named["source"], path=named.get("path"), references=references)


def _is_whole(turns: list[str] | None, question: Question) -> bool:
    return turns is not None and len(turns) >= len(question.turns)
