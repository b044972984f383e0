"""Where records are kept: one ``record.json`` a run folder, and an index of finished config hashes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.records.schema import Record

RECORD = "record.json"
JOB = "job.json"  # what a run was asked to do, written before it begins
# Left in the folder of a run that was skipped, so that a later command may name that folder all the same.
POINTER = "finished_in.json"
INDEX = ".finished"


def write_json(path: Path, data: Any) -> None:
    """Write JSON under a temporary name and rename it, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(_finite(data), indent=1, default=str, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _finite(data: Any) -> Any:
    """The same with infinity and NaN, which JSON lacks and a configuration may hold, as text."""
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


def save(record: Record, folder: Path) -> None:
    """Write a record into its run folder."""
    write_json(folder / RECORD, record.to_dict())


def load(folder: Path | str) -> Record:
    """Read the record of a run folder, following the pointer that a skipped run leaves.

    Raises:
        Refusal: when there is no record, or it cannot be read.
    """
    path = run_folder(folder) / RECORD
    try:
        return Record.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise Refusal(f"{path} cannot be read as a record: {error}") from error


def config_of(folder: Path | str) -> dict[str, Any]:
    """The configuration of a run: its record's, or its job's where it was cut off before it could leave a record.

    Raises:
        Refusal: when neither is there, or what is there cannot be read.
    """
    job = Path(folder) / JOB
    if (Path(folder) / RECORD).is_file() or not job.is_file():
        return load(folder).config
    try:
        config: dict[str, Any] = dict(json.loads(job.read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Refusal(f"{job} cannot be read as a job: {error}") from error
    return config


def run_folder(folder: Path | str) -> Path:
    """The folder that really holds the run named by ``folder``.

    Raises:
        Refusal: when neither a record nor a pointer to one is there.
    """
    folder = Path(folder)
    if (folder / RECORD).is_file():
        return folder
    pointer = folder / POINTER
    if pointer.is_file():
        try:
            target = _named_folder(pointer)
        except (OSError, ValueError) as error:
            raise Refusal(f"{pointer} cannot be read: {error}") from error
        if (target / RECORD).is_file():
            return target
        raise Refusal(f"{folder} points to {target}, which holds no {RECORD}: run it again with rerun=true")
    raise Refusal(f"{folder} holds no {RECORD}: give the folder of a finished run")


def mark_finished(record: Record, folder: Path, root: Path) -> None:
    """Enter a finished run in the index below ``root``."""
    write_json(root / INDEX / f"{record.config_hash}.json", {"folder": str(folder.resolve())})


def find_finished(config_hash: str, root: Path) -> Path | None:
    """The folder of the finished run with this hash, or None; a folder that was deleted or changed is none."""
    entry = root / INDEX / f"{config_hash}.json"
    if not entry.is_file():
        return None
    try:
        folder = _named_folder(entry)
        record = load(folder)
    except (OSError, ValueError, Refusal):
        return None
    return folder if record.status == "ok" and record.config_hash == config_hash else None


def _named_folder(path: Path) -> Path:
    """The folder that a pointer or an entry of the index names.

    Raises:
        ValueError: when it names none.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or not isinstance(data.get("folder"), str):
        raise ValueError("it names no folder")
    return Path(data["folder"])
