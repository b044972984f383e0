"""benchmarks/meters.py where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    out = tmp_path / "meters.json"
    words = [sys.executable, "benchmarks/meters.py", "--out", str(out)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    assert "needs an NVIDIA GPU" in done.stdout
    assert not out.exists()
