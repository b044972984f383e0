from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_kernels_compute_what_float64_does() -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    file = Path(__file__).with_name("interpreted_kernels.py")
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(file), *options],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "9 passed" in done.stdout
