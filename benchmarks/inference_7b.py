"""A 7B's resource figures by quantization: one sweep of ``infer.py`` on Llama-2-7B's shape with random weights.

    python benchmarks/inference_7b.py --out results/h100/inference_7b

Eager ``generate`` at batch 1, prompts of 128 tokens, 128 new tokens; memory, speed and energy are true, text is not.
Each job's record is kept below ``--out``. Needs a CUDA GPU of at least 40 GB for the float32 row.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from llm_at_home.hardware.present import present_gpus

ROOT = Path(__file__).resolve().parent.parent
SWEEP = ["quant=none,int8,nf4,nf4_nested,fp4"]
WORDS = [
    *("model=llama2_7b", "model.weights=random", "questions=synthetic", "questions.prompt_tokens=128", "limit=1"),
    *("engine.max_new_tokens=128", "repeats=5", "logger=none", "rerun=true"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    if not present_gpus():
        print("inference_7b.py needs a CUDA GPU, and none is visible", file=sys.stderr)
        return 2
    work = Path("multirun") / "benchmark_inference_7b"
    shutil.rmtree(work, ignore_errors=True)
    environment = {key: value for key, value in os.environ.items() if key != "LLM_AT_HOME_STAMP"}
    commands = (["infer.py", "-m", *WORDS, *SWEEP], ["infer.py", "-m", *WORDS, "quant=none", "dtype=float32"])
    for i, words in enumerate(commands):
        subprocess.run([sys.executable, *words, f"hydra.sweep.dir={work}/{i}"], cwd=ROOT, env=environment, check=False)
    for path in sorted(work.rglob("record.json")):
        folder = out / "_".join(path.parent.relative_to(work).parts)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
