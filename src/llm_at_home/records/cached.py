"""Results that are costly to make and can be made again: each is made once, under a hash of what it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llm_at_home.paths import cache_dir
from llm_at_home.records.store import write_json

KEY = "made_from.json"


def key_hash(key: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits over everything that the result depends on."""
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True, default=str).encode()).hexdigest()[:16]


def cached_folder(kind: str, key: Mapping[str, Any]) -> Path:
    """Where the result is kept, whether it has been made or not."""
    return cache_dir() / kind / key_hash(key)


def is_made(kind: str, key: Mapping[str, Any]) -> bool:
    """Whether the result is there, whole."""
    return (cached_folder(kind, key) / KEY).is_file()


def cached(kind: str, key: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """The folder with the result, made now if it is not there.

    It is made under a temporary name and renamed when it is whole, so that an interruption leaves nothing half done; a
    lock keeps two processes from making the same thing at once. ``made_from.json`` in the folder holds the key.

    Args:
        kind: what it is, a folder of the cache: ``quantized``, say.
        key: everything that can change the result, as plain values.
        make: writes the result into the empty folder that it is given.
    """
    from filelock import FileLock

    folder = cached_folder(kind, key)
    if is_made(kind, key):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder) + ".lock"):
        if not is_made(kind, key):
            _remove_left_behind(folder)
            temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
            temporary.mkdir()
            try:
                make(temporary)
                write_json(temporary / KEY, dict(key))
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _remove_left_behind(folder: Path) -> None:
    """What a killed process left: nobody else can be making it, since the lock is held."""
    for old in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(old, ignore_errors=True)
