"""What a person needs to repeat a run: code, packages, machine, model and data."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from llm_at_home.hardware.present import present_gpus
from llm_at_home.records.hashing import package_versions


def collect(extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """Provenance at the start of a run; ``extra`` adds what only the caller knows (model, data, seed)."""
    return {
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"model": cpu_model(), "cores": os.cpu_count()},
        "gpu": [gpu.describe() for gpu in present_gpus()] or None,
        **(extra or {}),
    }


def git_state(folder: Path | None = None) -> dict[str, Any] | None:
    """Commit and dirtiness of the checkout that holds this package, or None outside one.

    Where the code was copied without its history, ``LLM_AT_HOME_COMMIT`` may name the commit (dirtiness is unknown).
    """
    if os.environ.get("LLM_AT_HOME_COMMIT"):
        return {"commit": os.environ["LLM_AT_HOME_COMMIT"], "dirty": None}
    where = folder or Path(__file__).parent
    try:
        commit = _git(where, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(where, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


def cpu_model() -> str:
    """The processor's name as the kernel gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
