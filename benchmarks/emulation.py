"""What fits a smaller card, tried on a larger one, and a crash in the middle of a sweep.

    python benchmarks/emulation.py --out results/h100/emulation

Llama-2-7B's shape with random weights under ``gpu=t4`` (its memory is a result, speed and energy are the host card's):
float32 must run out of memory, bfloat16 must be refused, float16 loads and shows the longest prompt that fits, nf4
fits. Each job's record is kept below ``--out``; the table goes to ``emulation.json`` there. Needs a CUDA GPU of at
least 16 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from llm_at_home.hardware.present import present_gpus
from llm_at_home.records.provenance import collect

ROOT = Path(__file__).resolve().parent.parent
MODEL = ["model=llama2_7b", "model.weights=random", "questions=synthetic", "limit=1", "engine.max_new_tokens=8"]
PROMPTS = (1024, 2048, 2304, 2560, 2816, 3072)
SWEEP = [
    *("train.py", "-m", "model=llama2_7b", "model.weights=random", "model.architecture.num_hidden_layers=1"),
    *("data=synthetic", "data.max_length=64", "trainer.max_steps=4", "callbacks.power.idle_seconds=0.5"),
    *("+callbacks.disaster._target_=disasters.Disaster", "+callbacks.disaster.kind=nothing,segfault,quiet"),
]


def run(words: list[str], folder: Path) -> dict[str, Any]:
    """Run a command, and return its exit code, what it said at the end and its record, if it left one."""
    where = "hydra.sweep.dir" if "-m" in words else "hydra.run.dir"
    command = [sys.executable, *words, "logger=none", "rerun=true", f"{where}={folder}"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/tests/tasks:{os.environ.get('PYTHONPATH', '')}"}
    environment.pop("LLM_AT_HOME_STAMP", None)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    path = folder / "record.json"
    record = json.loads(path.read_text()) if path.is_file() else None
    said = (done.stderr or done.stdout).strip().splitlines()
    return {"exit_code": done.returncode, "said": said[-1] if said else "", "record": record, "out": done.stdout}


def row(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    record = result["record"]
    if record is None:
        return {"case": name, "status": "refused", "exit_code": result["exit_code"], "said": result["said"]}
    figures = record["readings"]
    names = ("torch_allocated_peak", "torch_reserved_peak", "process_memory_peak", "device_memory_peak")
    peaks = {key: (figures.get(key) or {}).get("value") for key in names}
    return {
        "case": name,
        "status": record["status"],
        "exit_code": result["exit_code"],
        "unit": "GB",
        **peaks,
        "emulation": record["provenance"].get("emulation"),
        "notes": record["notes"],
        "error": (record["error"] or {}).get("message"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    if not present_gpus():
        print("emulation.py needs a CUDA GPU, and none is visible", file=sys.stderr)
        return 2
    work = Path("multirun") / "benchmark_emulation"
    shutil.rmtree(work, ignore_errors=True)
    cases = {
        "none float32": ["dtype=float32"],
        "none bfloat16": ["dtype=bfloat16"],
        "nf4 float16": ["quant=nf4", "dtype=float16"],
        **{f"none float16, prompt {n}": ["dtype=float16", f"questions.prompt_tokens={n}"] for n in PROMPTS},
    }
    rows = []
    for i, (name, words) in enumerate(cases.items()):
        folder = work / f"t4_{i}"
        rows.append(row(f"gpu=t4 {name}", run(["infer.py", "gpu=t4", *MODEL, *words], folder)))
        shown = {key: value for key, value in rows[-1].items() if key not in ("emulation", "notes", "unit")}
        print(shown, flush=True)
        if (folder / "record.json").is_file():
            (out / folder.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "record.json", out / folder.name)
        if "prompt" in name and rows[-1]["status"] == "out_of_memory":
            break
    sweep = run(SWEEP, work / "sweep")
    tail = sweep["out"].strip().splitlines()[-4:]
    print("\n".join(tail))
    out.mkdir(parents=True, exist_ok=True)
    answer = {"rows": rows, "sweep_with_a_crash": {"exit_code": sweep["exit_code"], "said": tail}}
    (out / "emulation.json").write_text(json.dumps({**answer, "provenance": collect()}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
