"""What people's grades are compared with: a judge's scores and fidelity figures of the same models, read from runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm_at_home.errors import Refusal
from llm_at_home.human.runs import Model
from llm_at_home.records import store
from llm_at_home.records.jsonl import read_jsonl
from llm_at_home.records.schema import Record

JUDGMENTS = "judgments.jsonl"
MISSING_SCORE = -1  # FastChat's sign for "no score"
DETECTABLE = "_detectable"  # ends the names of figures that say what a design can tell, and nothing of the model


@dataclass
class Judge:
    """One judge's mean score of each answer: (models, questions), NaN where it has none; ``missing`` counts those."""

    name: str
    scores: np.ndarray
    missing: int = 0


@dataclass
class _Sums:
    total: dict[tuple[int, int], float] = field(default_factory=lambda: defaultdict(float))
    times: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))


def read_judges(folders: Sequence[str | Path], models: Sequence[Model], questions: Sequence[int]) -> list[Judge]:
    """Scores of single-answer grading, by judge; an answer's score is the mean over its turns and repeats.

    Raises:
        Refusal: for a folder without judgments, or of none of the study's models.
    """
    sums: dict[str, _Sums] = defaultdict(_Sums)
    for folder in folders:
        path = Path(folder) if Path(folder).is_file() else store.run_folder(folder) / JUDGMENTS
        if not path.is_file():
            raise Refusal(f"{folder} holds no {JUDGMENTS}: name the folder of a run of evaluate.py task=judge")
        matched = False
        about = _subject(path.parent)
        for row in read_jsonl(path):
            if "score" not in row or "model" not in row:
                continue  # a pairwise judgment
            m = _judged(models, str(row["model"]), about)
            if m is None:
                continue
            matched = True
            score = row["score"]
            if row["question_id"] in questions and score is not None and score != MISSING_SCORE:
                place = m, questions.index(row["question_id"])
                judge = sums[_judge_name(row)]
                judge.total[place] += float(score)
                judge.times[place] += 1
        if not matched:
            raise Refusal(f"{folder} holds single-answer scores of none of the study's models")
    return [_judge(name, one, len(models), len(questions)) for name, one in sorted(sums.items())]


def _judge(name: str, sums: _Sums, models: int, questions: int) -> Judge:
    scores = np.full((models, questions), np.nan)
    for place, times in sums.times.items():
        scores[place] = sums.total[place] / times
    return Judge(name, scores, int(np.isnan(scores).sum()))


def _judge_name(row: dict[str, Any]) -> str:
    judge = row.get("judge")
    return str(judge[0] if isinstance(judge, list) and judge else judge or "unnamed")


def _subject(folder: Path) -> str | None:
    """The config hash of the run that was judged, where a record names it."""
    if not (folder / store.RECORD).is_file():
        return None
    subject = store.load(folder).subject
    return str(subject["config_hash"]) if subject and subject.get("config_hash") else None


def _judged(models: Sequence[Model], model_id: str, about: str | None) -> int | None:
    """Which of the models a judgment is of: the judged run's hash tells, where there is one, and else its name."""
    hashes = [i for i, model in enumerate(models) if about and model.config_hash == about]
    if hashes:
        return hashes[0]
    named = [i for i, m in enumerate(models) if m.model_id == model_id and not (about and m.config_hash)]
    return named[0] if len(named) == 1 else None


def read_fidelity(folders: Sequence[str | Path], models: Sequence[Model]) -> dict[str, np.ndarray]:
    """Each fidelity figure of each model: name to (models,), NaN where there is none.

    A run is of the model with the same base and quantization and no adapter.

    Raises:
        Refusal: for a record of another task, or of none of the study's models.
    """
    figures: dict[str, np.ndarray] = {}
    for folder in folders:
        record = store.load(folder)
        if record.config.get("task") != "fidelity":
            raise Refusal(f"{folder} is no run of evaluate.py task=fidelity")
        of = [i for i, model in enumerate(models) if _same_base(model, record)]
        if not of:
            raise Refusal(f"{folder} measures the fidelity of none of the study's models")
        for name, reading in record.quality.items():
            if reading.value is not None and not name.endswith(DETECTABLE):
                figures.setdefault(name, np.full(len(models), np.nan))[of] = reading.value
    return figures


def _same_base(model: Model, record: Record) -> bool:
    keys = ("model", "quant", "dtype")
    return model.adapter == "none" and all(model.config.get(key) == record.config.get(key) for key in keys)
