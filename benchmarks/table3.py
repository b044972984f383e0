"""The paper's Table III on one GPU: adapters by base, on Llama-2-7B's shape with random weights.

    python benchmarks/table3.py --out results/h100/table3 --minutes 15
    python benchmarks/table3.py --table results/h100/table3

A row is one run of ``train.py experiment=[paper/ROW,table3]``, in a process of its own, and leaves
``OUT/<row>/record.json``. ``make paper`` runs the paper's own. A row that is there (out of memory is a result) is not
run again, so the same command goes on where an earlier one stopped.
Needs a GPU of 80 GB for the float32 rows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import rows as common

from llm_at_home.hardware.present import present_gpus
from llm_at_home.records import store
from llm_at_home.records.schema import Record
from llm_at_home.reporting import facts, published

# Of conf/experiment/paper, in the protocol of conf/experiment/table3.yaml; then what stands beside them.
PAPER = ("lora", "adalora", "lokr")
HALVED = ["experiment=table3", "quant=none", "dtype=bfloat16"]
NF4 = ["experiment=table3", "quant=nf4", "dtype=bfloat16"]
ROWS = {
    **{f"{name}_float32": [f"experiment=[paper/{name},table3]"] for name in PAPER},
    **{f"{name}_nf4": [f"experiment=[paper/q_{name},table3]"] for name in PAPER},
    "lokr_peft_float32": ["experiment=[paper/lokr_peft,table3]"],
    **{f"{name}_bfloat16": [*HALVED, f"adapter={name}"] for name in PAPER},
    "lokr_peft_bfloat16": [*HALVED, "adapter=lokr", "adapter.implementation=peft"],
    **{f"{name}_nf4": [*NF4, f"adapter={name}"] for name in ("bottleneck", "oft", "vera", "dora", "loha")},
}
HEADLINE = ("steps_per_second", "energy_per_step", "torch_allocated_peak")
MEMORY = ("torch_allocated_peak", "torch_reserved_peak", "process_memory_peak", "device_memory_peak")


def measure(args: argparse.Namespace) -> int:
    """Run every row that is not there yet, until the time is up; 1 when one left no usable record."""
    commands = [
        (name, ["train.py", *words, *args.overrides]) for name, words in ((name, ROWS[name]) for name in args.rows)
    ]
    return common.run_rows(commands, args.out, args.minutes, HEADLINE)


def table(folder: Path) -> str:
    """The records below a folder as a Markdown table, the paper's figures beside them."""
    paper = published.table3()
    titles = [
        *("row", "kernel", "parameters", "torch allocated, peak (GB)", "reserved", "process", "device"),
        *("steps/s", "95 % interval", "J/step", f"{paper['steps']:,} steps, scaled (Wh)"),
        *(f"paper, {paper['device']}: {figure}" for figure in ("memory (GB)", "steps/s", "Wh")),
    ]
    there = [name for name in ROWS if common.status(folder / name) is not None]
    return common.markdown([titles, *(_cells(name, store.load(folder / name)) for name in there)])


def _cells(name: str, record: Record) -> list[str]:
    def cell(key: str, digits: int) -> str:
        return common.text(record.readings.get(key), digits)

    pace = record.readings.get("steps_per_second")
    interval = pace.interval95 if pace is not None else None
    said = None if "peft" in name else published.finetuning_counterpart(record)
    keys = ("vram_gb", "steps_per_second", "energy_wh")
    return [
        name if record.status == "ok" else f"{name} ({record.status.replace('_', ' ')})",
        facts.kernel(record) or common.DASH,
        cell("trainable_parameters", 0),
        *(cell(key, 2) for key in MEMORY),
        cell("steps_per_second", 3),
        f"{interval[0]:.3f}–{interval[1]:.3f}" if interval else common.DASH,
        cell("energy_per_step", 0),
        common.text(published.scaled_training_energy(record), 0),
        *(common.DASH if said is None else f"{said[key]:g}" for key in keys),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="measure, and keep each row's record below this folder")
    what.add_argument("--table", type=Path, metavar="FOLDER", help="print the table of the records in this folder")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--minutes", type=float, default=60, help="start no row after so many (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="after --: overrides for every row, such as trainer.max_steps=6")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return 0
    if not present_gpus() and "gpu=cpu" not in args.overrides:
        print("table3.py needs a CUDA GPU, and none is visible", file=sys.stderr)
        return 2
    return measure(args)


if __name__ == "__main__":
    sys.exit(main())
