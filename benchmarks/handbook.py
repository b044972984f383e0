"""Every adapter on the handbook: what it learns, what it forgets, what it costs; on the whole embedded model.

    python benchmarks/handbook.py --out results/two_core_cpu/handbook
    python benchmarks/handbook.py --table results/two_core_cpu/handbook

Where a method's size can be chosen it has about as many parameters as LoRA of rank 32, and its update is not scaled
down; the others are as small as they are. No method's learning rate is known beforehand, so each has two candidates:
both make 30 steps, and the one with the lower mean loss over the last five, on the same training batches, makes the run
(``OUT/ADAPTER/rates.json`` keeps both losses; the test split is not looked at). The run is ``train.py
experiment=handbook``, 105 steps of 8; ``evaluate.py task=text`` then answers the test split and measures the perplexity
of home_bench's reference answers, which the training did not teach: what rose there was forgotten. ``OUT/base`` is the
model without an adapter. What is there is not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import rows as common

from llm_at_home.records import store
from llm_at_home.reporting import facts

LOW, MIDDLE, HIGH, SMALLEST = (1e-3, 3e-3), (3e-3, 1e-2), (1e-2, 3e-2), (1e-4, 3e-4)
# Overrides, and the two learning rates.
ADAPTERS: dict[str, tuple[list[str], tuple[float, float]]] = {
    "lora": (["adapter=lora_r32"], LOW),
    "lokr": (["adapter=lokr", "adapter.r=64", "adapter.alpha=64"], MIDDLE),
    "adalora": (["adapter=adalora", "adapter.target_r=32", "adapter.init_r=48", "adapter.lora_alpha=48"], MIDDLE),
    "bottleneck": (["adapter=bottleneck", "adapter.bottleneck_size=140"], LOW),
    "loha": (["adapter=loha", "adapter.r=16", "adapter.alpha=16"], MIDDLE),
    "dora": (["adapter=dora", "adapter.r=32", "adapter.lora_alpha=32"], LOW),
    "oft": (["adapter=oft", "adapter.oft_block_size=96"], SMALLEST),
    "rslora": (["adapter=rslora", "adapter.r=32", "adapter.lora_alpha=5.657"], LOW),
    "full": (["adapter=full"], SMALLEST),
    "vera": (["adapter=vera"], HIGH),
    "ia3": (["adapter=ia3"], HIGH),
    "layernorm": (["adapter=layernorm"], HIGH),
    "prefix": (["adapter=prefix"], HIGH),
    "p_tuning": (["adapter=p_tuning"], MIDDLE),
    "prompt": (["adapter=prompt"], HIGH),
}
TRIAL = ["trainer.max_steps=30", "scheduler.num_decay_steps=10", "callbacks.power.idle_seconds=0"]
LAST = 5  # steps whose losses are averaged
TRAIN, TEXT, BASE, RATES = "train", "text", "base", "rates.json"
WEIGHTS = common.ROOT / "multirun" / "handbook"  # too large to be kept with the records
COMMON = ["train.py", "experiment=handbook", "logger=none", "rerun=true"]
EVALUATE = ["evaluate.py", "task=text", "logger=none"]
HEADLINE = ("exact_match", "perplexity_home_bench")


def trial(words: list[str], rate: float, overrides: list[str]) -> float | None:
    """The mean loss over the last steps of a short run at this learning rate, or None where it failed."""
    with tempfile.TemporaryDirectory(prefix="trial_") as folder:
        command = [sys.executable, *COMMON, *words, f"optimizer.lr={rate}", *TRIAL, *overrides]
        done = subprocess.run([*command, f"hydra.run.dir={folder}"], cwd=common.ROOT, capture_output=True)
        if done.returncode:
            return None
        with (Path(folder) / "metrics.csv").open() as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)][-LAST:]
    return sum(losses) / len(losses)


def learning_rate(name: str, out: Path, overrides: list[str]) -> float:
    """The better of an adapter's two learning rates, found once."""
    words, candidates = ADAPTERS[name]
    if not (out / RATES).is_file():
        out.mkdir(parents=True, exist_ok=True)
        found = {str(rate): trial(words, rate, overrides) for rate in candidates}
        (out / RATES).write_text(json.dumps(found, indent=1) + "\n")
    known = {float(rate): loss for rate, loss in json.loads((out / RATES).read_text()).items() if loss is not None}
    return min(known, key=known.__getitem__, default=candidates[0])


def measure(args: argparse.Namespace) -> int:
    """Run what is not there yet; 1 when something left no usable record."""
    if common.status(args.out / BASE) not in common.DONE:
        print(common.run_row(BASE, [*EVALUATE, *args.overrides], args.out, HEADLINE), flush=True)
    failed = False
    for name in args.adapters:
        out, run = args.out / name, WEIGHTS / name
        if common.status(out / TEXT) in common.DONE:
            continue
        rate = learning_rate(name, out, args.overrides)
        words = [*COMMON, *ADAPTERS[name][0], f"optimizer.lr={rate}", *args.overrides, f"hydra.run.dir={run}"]
        subprocess.run([sys.executable, *words], cwd=common.ROOT, capture_output=True)
        store.save(store.load(run), out / TRAIN)
        where = f"adapter_path={run}" if name != "full" else f"model.source={run}/model"
        print(
            f"{name}, {rate:g}:", common.run_row(TEXT, [*EVALUATE, where, *args.overrides], out, HEADLINE), flush=True
        )
        failed |= common.status(out / TEXT) not in common.DONE
    print(table(args.out))
    return int(failed)


def table(folder: Path) -> str:
    """The adapters as Markdown, the best at the test split first."""
    titles = ["adapter", "parameters", "learning rate", "steps/s", "resident set, peak (GB)", "loss, last step"]
    titles += ["exact match (%)", "refusal recall (%)", "perplexity, home_bench"]
    there = [name for name in ADAPTERS if common.status(folder / name / TEXT) is not None]
    rows = []
    for name in there:
        train, text = store.load(folder / name / TRAIN), store.load(folder / name / TEXT)
        if train.status != "ok":
            rows.append((-1.0, [name, facts.error_line(train), *[common.DASH] * 7]))
            continue
        match = text.quality["exact_match"]
        ends = "" if match.interval95 is None else " [{:.1f}, {:.1f}]".format(*(100 * e for e in match.interval95))
        recall = text.quality["refusal_recall"].value
        cells = [
            *(name, common.text(train.readings["trainable_parameters"], 0), f"{train.config['optimizer']['lr']:g}"),
            *(common.text(train.readings.get(key), digits) for key, digits in (("steps_per_second", 3),)),
            *(common.text(train.readings.get("resident_set_peak"), 2), common.text(train.quality["loss_last"], 3)),
            *(f"{100 * (match.value or 0):.1f}{ends}", common.DASH if recall is None else f"{100 * recall:.1f}"),
            common.text(text.quality.get("perplexity_home_bench"), 1),
        ]
        rows.append((match.value or 0.0, cells))
    lines = [cells for _, cells in sorted(rows, key=lambda row: -row[0])]
    if common.status(folder / BASE) is not None:
        base = store.load(folder / BASE).quality
        match = base["exact_match"].value
        worth = [common.DASH if match is None else f"{100 * match:.1f}", common.DASH]
        lines.append(["(no adapter)", *[common.DASH] * 5, *worth, common.text(base.get("perplexity_home_bench"), 1)])
    return common.markdown([titles, *lines])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="measure, and keep each adapter's records below this folder")
    what.add_argument("--table", type=Path, metavar="FOLDER", help="print the table of the records in this folder")
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=list(ADAPTERS), metavar="NAME")
    parser.add_argument("overrides", nargs="*", help="after --: overrides for every run, such as gpu=cpu")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return 0
    return measure(args)


if __name__ == "__main__":
    sys.exit(main())
