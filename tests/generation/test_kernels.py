"""The Triton kernels without a card; with Triton in the environment every start would take seconds longer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_at_home.paths import cache_dir

TRITON = "3.9.0"


@pytest.fixture(scope="module")
def triton() -> Path:
    """A folder with Triton alone, kept from one run to the next."""
    folder = cache_dir() / "test_packages" / f"triton-{TRITON}"
    if not (folder / "triton").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, f"triton=={TRITON}"], check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_the_kernels_compute_what_float64_does(triton: Path) -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    file = Path(__file__).with_name("interpreted_kernels.py")
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    path = os.pathsep.join(filter(None, [str(triton), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(file), *options],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "9 passed" in done.stdout
