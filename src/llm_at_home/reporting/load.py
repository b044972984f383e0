"""Find and read every ``record.json`` below some folders; what cannot be read is listed, never fatal."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from llm_at_home.errors import Refusal
from llm_at_home.records.schema import Record
from llm_at_home.reporting import DEFAULT_FOLDERS
from llm_at_home.reporting.facts import clean

# What a damaged or foreign file can raise on its way through json and Record.from_dict.
_UNREADABLE = (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError)


@dataclass(frozen=True)
class Run:
    """A record, the file that holds it and when its run started."""

    record: Record
    path: Path
    when: datetime


@dataclass(frozen=True)
class LeftOut:
    """A ``record.json`` that could not be used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Loaded:
    """What was found: ``runs``, oldest first; ``superseded``, other runs of a config; files left out."""

    runs: tuple[Run, ...]
    superseded: tuple[Run, ...] = ()
    left_out: tuple[LeftOut, ...] = ()


def load(folders: Sequence[Path | str]) -> Loaded:
    """Read the records below ``folders``; of several with one config hash the newest that finished stays,
    or the newest where none did.

    Raises:
        Refusal: for a named folder that does not exist, or when there is no ``record.json`` at all.
    """
    found: list[Run] = []
    left_out: list[LeftOut] = []
    for path in _paths(folders):
        try:
            found.append(_read(path))
        except _UNREADABLE as error:
            left_out.append(LeftOut(path, clean(_why(error))))
    if not found and not left_out:
        places = ", ".join(str(f) for f in folders)
        raise Refusal(f"no record.json below {places}: `make demo` makes some, and so does `python infer.py`")
    found.sort(key=lambda run: run.when)
    # A run that is made again and breaks off leaves its figures where they were.
    newest = {_identity(run): run for run in sorted(found, key=lambda run: run.record.status == "ok")}
    kept = tuple(run for run in found if newest[_identity(run)] is run)
    older = tuple(run for run in found if newest[_identity(run)] is not run)
    return Loaded(kept, older, tuple(left_out))


def _paths(folders: Sequence[Path | str]) -> Iterator[Path]:
    seen: set[Path] = set()
    for folder in folders:
        if not Path(folder).is_dir():
            if str(folder) in DEFAULT_FOLDERS:
                continue
            raise Refusal(f"{folder} is no folder: name one that holds runs, or none for the defaults")
        for here, below, files in os.walk(folder):
            below.sort()
            path = Path(here, "record.json")
            # Two folders given may lie one inside the other.
            if "record.json" in files and path.resolve() not in seen:
                seen.add(path.resolve())
                yield path


def _read(path: Path) -> Run:
    record = Record.from_dict(json.loads(path.read_text(encoding="utf-8")))
    return Run(record, path, _started(record) or datetime.fromtimestamp(path.stat().st_mtime, UTC))


def _started(record: Record) -> datetime | None:
    said = record.provenance.get("started_at")
    try:
        if isinstance(said, int | float):
            return datetime.fromtimestamp(said, UTC)
        when = datetime.fromisoformat(said or "")
    except (ValueError, TypeError, OverflowError, OSError):
        return None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _identity(run: Run) -> object:
    # A record without a hash is nobody's duplicate.
    return (run.record.task, run.record.config_hash) if run.record.config_hash else run.path


def _why(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (line {error.lineno})"
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    if type(error) is ValueError:
        return str(error)
    return f"not a run record: {error}"
