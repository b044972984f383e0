"""SGD with cosine restarts against AdamW: how far each comes in equal steps, at several learning rates.

    python benchmarks/convergence.py --out results/two_core_cpu/convergence -- gpu=cpu
    python benchmarks/convergence.py --table results/two_core_cpu/convergence

The comparison that the paper recommends to make, since SGD keeps no state. A row is one run of ``train.py
data=handbook``: LoRA of rank 32 on the embedded model, 32 steps of two conversations, clipped at 0.3, two seeds, each
of which draws its own adapter and order of the data; rows of one seed see the same conversations in the same order. No
conversation comes twice, so a step's loss is that of data not trained on. What counts is the mean loss over the tokens
of the last eight steps. The cosine starts twice, at the steps 0 and 8, and ends with the run. ``curves.json`` has each
row's loss by step. What is there is not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from pathlib import Path

import rows as common

from llm_at_home.records import store

COSINE = ["scheduler=cosine_restarts", "scheduler.T_0=8", "scheduler.T_mult=3"]
# Overrides, and the learning rates.
METHODS: dict[str, tuple[list[str], tuple[float, ...]]] = {
    "sgd_cosine_restarts": (["optimizer=sgd", *COSINE], (0.3, 1.0, 3.0)),
    "adamw": (["optimizer=adamw"], (3e-4, 1e-3, 3e-3)),
    "adamw_cosine_restarts": (["optimizer=adamw", *COSINE], (1e-3, 3e-3)),
    "adamw_8bit": (["optimizer=adamw_8bit"], (1e-3,)),
}
SEEDS = (0, 1)
STEPS, LAST = 32, 8
PROTOCOL = ["train.py", "data=handbook", "adapter=lora_r32", "data.batch_size=2", "callbacks.accumulation.steps=1"]
PROTOCOL += [f"trainer.max_steps={STEPS}", "callbacks.power.idle_seconds=0", "logger=none"]
# A run that jumps is a result here, and is to be seen to its end.
PROTOCOL += ["callbacks.divergence.spike=null"]
CURVES, LOG = "curves.json", "metrics.csv"
HEADLINE = ("loss_first", "loss_last")


def rows() -> dict[str, list[str]]:
    """Each row's name and overrides, the seeds of a learning rate one after the other."""
    return {
        name_of(method, rate, seed): [*PROTOCOL, *words, f"optimizer.lr={rate}", f"seed={seed}"]
        for method, (words, rates) in METHODS.items()
        for rate in rates
        for seed in SEEDS
    }


def name_of(method: str, rate: float, seed: int) -> str:
    return f"{method}_{rate:g}_seed{seed}"


def measure(out: Path, minutes: float, overrides: list[str]) -> int:
    """Run what is not there yet, until the time is up; 1 when a row left no usable record."""
    deadline, failed = time.monotonic() + minutes * 60, False
    for name, command in rows().items():
        if common.status(out / name) in common.DONE:
            continue
        if time.monotonic() > deadline:
            print(f"{minutes:g} minutes are up: the same command goes on with {name}")
            break
        print(common.run_row(name, [*command, *overrides], out, HEADLINE, keep=[LOG]), flush=True)
        failed |= common.status(out / name) not in common.DONE
        _keep_curve(out, name)
    return int(failed)


def _keep_curve(out: Path, name: str) -> None:
    log = out / name / LOG
    if log.is_file():
        with log.open() as file:
            steps = [
                {"loss": round(float(row["loss"]), 5), "tokens": float(row["tokens"])} for row in csv.DictReader(file)
            ]
        store.write_json(out / CURVES, {**curves(out), name: steps})
        log.unlink()


def curves(folder: Path) -> dict[str, list[dict[str, float]]]:
    """The loss (nats/token) and tokens of each row's steps."""
    path = folder / CURVES
    return json.loads(path.read_text()) if path.is_file() else {}


def last_loss(steps: list[dict[str, float]]) -> float | None:
    """The mean loss over the tokens of the last steps, or None where the run did not come so far."""
    if len(steps) < STEPS:
        return None
    last = steps[-LAST:]
    return sum(step["loss"] * step["tokens"] for step in last) / sum(step["tokens"] for step in last)


def table(folder: Path) -> str:
    """A line for each optimizer and learning rate."""
    known = curves(folder)
    lines = [["optimizer", "learning rate", *(f"loss of the last {LAST} steps, seed {seed}" for seed in SEEDS), "mean"]]
    for method, (_, rates) in METHODS.items():
        for rate in rates:
            losses = [last_loss(known.get(name_of(method, rate, seed), [])) for seed in SEEDS]
            whole = [loss for loss in losses if loss is not None]
            mean = f"{sum(whole) / len(whole):.3f}" if len(whole) == len(SEEDS) else common.DASH
            shown = [common.DASH if loss is None else f"{loss:.3f}" for loss in losses]
            lines.append([method.replace("_", " "), f"{rate:g}", *shown, mean])
    return common.markdown(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="measure, and keep each row's record below this folder")
    what.add_argument("--table", type=Path, metavar="FOLDER", help="print the table of the records in this folder")
    parser.add_argument("--minutes", type=float, default=60, help="start nothing after so many (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="after --: overrides for every run, such as gpu=cpu")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return 0
    failed = measure(args.out, args.minutes, args.overrides)
    print(table(args.out))
    return failed


if __name__ == "__main__":
    sys.exit(main())
