"""A judge over answers, and the test of a judge: what ``task=judge`` and ``task=judge_check`` do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_at_home.records import hashing, store
from llm_at_home.records.jsonl import read_jsonl
from llm_at_home.records.schema import Record

ANSWERS = "answers.jsonl"
#: A judge of fewer parameters is called small in its records.
SMALL = 7_000_000_000


def answer_folders(config: Mapping[str, Any]) -> list[str]:
    """What ``answers=`` names: one run folder or file of answers, or several."""
    named = config["answers"]
    return [str(one) for one in named] if isinstance(named, list) else [str(named)] if named else []


def answers_file(place: str) -> Path:
    """The file of answers of a run folder, or the file that was named itself."""
    return Path(place) if Path(place).is_file() else store.run_folder(place) / ANSWERS


def differ_in_seed_alone(one: str, other: str) -> bool:
    """Whether two runs are of one model under two seeds."""
    configs = [store.load(place).config for place in (one, other)]
    groups = ("model", "quant", "dtype", "adapter_path", "questions", "limit", "engine")
    return configs[0].get("seed") != configs[1].get("seed") and all(
        configs[0].get(key) == configs[1].get(key) for key in groups
    )


def ingredients(config: Mapping[str, Any]) -> dict[str, Any]:
    """Content hashes of the answers, the references and the judge's model file that a configuration names."""
    from llm_at_home.data.questions import questions_hash
    from llm_at_home.evaluation.judge.local import find_gguf
    from llm_at_home.evaluation.judge.settings import embedded

    found: dict[str, Any] = {}
    named = {"answers": answer_folders(config), "baseline": [config["baseline"]], "own": [config.get("own_answers")]}
    for key, places in named.items():
        if hashes := [hashing.file_hash(answers_file(place)) for place in places if place]:
            found[key] = hashes
    asked = _asked(config)[0]
    found["judge_questions"] = questions_hash(asked["source"], path=asked["path"], references=references_of(config))
    if embedded(config["judge"]):
        found["judge_gguf"] = hashing.file_hash(find_gguf(config["judge"]["gguf"]))
    return found


def judge(config: Mapping[str, Any], folder: Path, record: Record) -> None:
    """Grade the answers of one run, alone, against a baseline's or among several, on the questions that were asked."""
    from llm_at_home.evaluation.judge import judge_run

    places = answer_folders(config)
    record.subject = _subject(places)
    _note_references(config, record, places)
    with _noted(record):
        quality, counts, costs = judge_run(config["judge"], *_material(config), folder=folder, others=_others(config))
    record.quality |= quality
    record.counts |= counts
    record.readings |= costs
    mean = quality.get("judge_score_mean")
    if mean and mean.interval95 and mean.interval95[0] == mean.interval95[1]:
        record.notes.append("the judge gave every answer the same score, so its scores tell nothing apart")
    record.notes += _size_note(config["judge"])


def check(config: Mapping[str, Any], folder: Path, record: Record) -> None:
    """Test a judge on planted pairs, and on two runs of one model under two seeds where they are given."""
    from llm_at_home.evaluation.judge.checking import check_judge

    same_model = None
    if config["answers"] and config["baseline"]:
        asked = questions_of({**config, "questions": None, "limit": None})
        same_model = (asked, _rows(answer_folders(config)[0]), _rows(config["baseline"]))
        record.subject = _subject(answer_folders(config))
    own = _rows(config["own_answers"]) if config["own_answers"] else []
    _note_references(config, record, answer_folders(config))
    with _noted(record):
        quality, counts, costs = check_judge(
            config["judge"], questions_of(config), folder, config["seed"], own, same_model
        )
    record.quality |= quality
    record.counts |= counts
    record.readings |= costs
    record.notes += _size_note(config["judge"])


def dry_run(config: Mapping[str, Any]) -> None:
    """Print what a run of the judge would ask and cost."""
    from llm_at_home.evaluation.judge import estimate_run

    print(estimate_run(config["judge"], *_material(config), others=_others(config)).as_text())


def questions_of(config: Mapping[str, Any]) -> list[Any]:
    """The questions that the judged run was asked; for a file of answers, those of the group ``questions``."""
    from llm_at_home.data.questions import load_questions

    asked, limit = _asked(config)
    return load_questions(
        asked["source"], path=asked["path"], ids=asked["ids"], limit=limit, references=references_of(config)
    )[: config["limit"]]


def references_of(config: Mapping[str, Any]) -> str:
    """Which set of reference answers the judge is shown."""
    return config["judge"].get("references") or _asked(config)[0]["references"] or "gpt-4"


def subject(record: Record, folder: str | Path) -> dict[str, Any]:
    """What an evaluation's record says of the run that it is about."""
    return {
        "folder": str(store.run_folder(folder)),
        "config_hash": record.config_hash,
        "task": record.task,
        "config": record.config,
    }


def _asked(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], int | None]:
    if config.get("questions"):
        return config["questions"], None
    judged = store.load(answer_folders(config)[0])
    return judged.config["questions"], judged.config["limit"]


def _subject(places: Sequence[str]) -> dict[str, Any] | None:
    if len(places) == 1 and not Path(places[0]).is_file():
        return subject(store.load(places[0]), places[0])
    models = sorted({str(row["model_id"]) for place in places for row in _rows(place)})
    return {"models": models, "folder": ", ".join(map(str, places)), "task": "infer"}


def _material(config: Mapping[str, Any]) -> tuple[list[Any], list[dict[str, Any]], list[dict[str, Any]] | None]:
    baseline = _rows(config["baseline"]) if config["baseline"] else None
    return questions_of(config), _rows(answer_folders(config)[0]), baseline


def _others(config: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    return [_rows(place) for place in answer_folders(config)[1:]]


def _rows(place: str) -> list[dict[str, Any]]:
    return list(read_jsonl(answers_file(place)))


def _note_references(config: Mapping[str, Any], record: Record, places: Sequence[str]) -> None:
    asked = _asked(config)[0]
    if asked["source"] == "mt_bench":
        record.provenance["references"] = references_of(config)


class _noted:
    """What was asked until a judge ended the run goes into its record all the same."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        from llm_at_home.evaluation.judge.client import JudgeError

        if isinstance(error, JudgeError):
            self._record.counts |= error.counts
            self._record.readings |= error.costs


def _size_note(judge: Mapping[str, Any]) -> list[str]:
    from llm_at_home.evaluation.judge.local import find_gguf, parameters
    from llm_at_home.evaluation.judge.settings import embedded

    if not embedded(judge):
        return []
    count = parameters(find_gguf(judge["gguf"]))
    if count >= SMALL:
        return []
    return [
        f"the judge is a small model ({count / 1e6:,.0f} million parameters): see its planted pairs, task=judge_check"
    ]
