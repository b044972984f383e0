"""The config hash: the same hash means that a run would give the same figures, so it need not run again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import llm_at_home

# Keys at the top level of a configuration that cannot change a figure; paths within its groups, whose contents are
# hashed instead, and keys there that cannot change one either.
NOT_HASHED = (
    *("paths", "logger", "rerun", "timeout_s", "grace_s", "strict", "resume", "metric"),
    *("adapter_path", "answers", "baseline", "own_answers"),
)
PATHS = {
    "data": ("path", "test_path"),
    "questions": ("path",),
    "judge": ("gguf", "requests_per_minute", "tokens_per_minute", "max_cost_usd", "cache", "dry_run"),
    "quant": ("path",),
    "text": ("context_path",),
}
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "gptqmodel", "torchao", "lightning", "xllamacpp", "gguf")


def config_hash(config: Mapping[str, Any], ingredients: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits over a resolved configuration and what it stands on.

    Args:
        config: the resolved configuration; paths, loggers, time-outs and the like are left out (``NOT_HASHED``).
        ingredients: content hashes of the inputs that the configuration names by path (model, data, answers, ...),
            package versions and the GPU's name.
    """
    kept = {key: _without_paths(key, value) for key, value in config.items() if key not in NOT_HASHED}
    text = json.dumps([kept, dict(ingredients)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without_paths(group: str, value: Any) -> Any:
    dropped = PATHS.get(group, ())
    return {key: v for key, v in value.items() if key not in dropped} if isinstance(value, Mapping) else value


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Installed versions of the packages that can change a figure, read without importing them."""
    versions = {"llm-at-home": llm_at_home.__version__}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def file_hash(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hash(folder: Path | str, patterns: Iterable[str]) -> str:
    """SHA-256 over the names and contents of the files in ``folder`` that match ``patterns``."""
    digest = hashlib.sha256()
    files = {path for pattern in patterns for path in Path(folder).glob(pattern) if path.is_file()}
    for path in sorted(files):
        digest.update(f"{path.relative_to(folder)}\0{file_hash(path)}\0".encode())
    return digest.hexdigest()
