"""`make demo` as a newcomer runs it: it teaches the model the handbook, and a second call repeats nothing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def make_demo() -> str:
    done = subprocess.run(["make", "demo"], cwd=ROOT, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def quality(folder: str) -> dict:
    folder = ROOT / "multirun" / "demo" / folder
    if not (folder / "record.json").exists():
        folder = Path(json.loads((folder / "finished_in.json").read_text())["folder"])
    record = json.loads((folder / "record.json").read_text())
    assert record["status"] == "ok"
    return {name: reading["value"] for name, reading in (record["quality"] | record["readings"]).items()}


@pytest.mark.slow
def test_the_demo_teaches_the_handbook_and_repeats_nothing():
    make_demo()
    before, after = quality("before"), quality("after")
    assert before["exact_match"] < 0.05
    assert after["exact_match"] >= 0.85
    assert after["false_refusal_rate"] < 0.1
    assert quality("train")["loss_last"] < 0.2 * quality("train")["loss_first"]
    for quant in ("none", "nf4", "int8"):
        assert quality(f"infer/{quant}")["decode_tokens_per_second"] > 0
    page = (ROOT / "reports" / "index.html").read_text()
    assert "smollm2_135m" in page
    again = make_demo()
    assert "ok: " not in again
    assert again.count("skipped: finished in") == 8
