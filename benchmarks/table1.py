"""The paper's Table I on one GPU: quantization by batch size, on Llama-2-7B's shape with random weights.

    python benchmarks/table1.py --out results/h100/table1 --minutes 25
    python benchmarks/table1.py --table results/h100/table1

A row is one run of ``infer.py experiment=[paper/ROW,table1]``, in a process of its own, and leaves
``OUT/<row>/record.json``. ``make paper`` runs those of batch 1 and more rows. A row that is there (out of memory is a
result) is not run again, so the same command goes on where an earlier one stopped.
The paper's own methods come first. Needs a GPU of 80 GB for float32.
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

# Of conf/experiment/paper, in the protocol of conf/experiment/table1.yaml.
NAMES = ("none_float32", "none_bfloat16", "int8", "nf4", "nf4_nested", "gptq", "awq")
PAPER = {name: [f"experiment=[paper/{name},table1]"] for name in NAMES}
UNPUBLISHED = ("fp4", "int4_torchao", "int8_torchao", "rtn")
OTHERS = {name: ["experiment=table1", "engine=eager", f"quant={name}"] for name in UNPUBLISHED}
HEADLINE = ("decode_tokens_per_second", "energy_per_token", "torch_allocated_peak")


def rows(methods: list[str], batches: list[int]) -> list[tuple[str, list[str]]]:
    """Name and overrides of each row, in the order of running."""
    return [
        (f"{name}_b{batch}", [*words, f"engine.batch_size={batch}"])
        for group in (PAPER, OTHERS)
        for batch in batches
        for name, words in group.items()
        if name in methods
    ]


def measure(args: argparse.Namespace) -> int:
    """Run every row that is not there yet, until the time is up; 1 when one left no usable record."""
    commands = [(name, ["infer.py", *words, *args.overrides]) for name, words in rows(args.rows, args.batches)]
    return common.run_rows(commands, args.out, args.minutes, HEADLINE)


def table(folder: Path) -> str:
    """The records below a folder as a Markdown table, the paper's figures beside those of batch 1."""
    paper = published.table1()
    tokens = f"{paper['generated_tokens']:,} tokens"
    titles = [
        *("quant", "batch", "kernel", "torch allocated, peak (GB)", "process, peak (GB)", "first token (s)"),
        *("decode (tokens/s), median of passes", "min–max", "with prompts (tokens/s)", "J/token"),
        *(f"{tokens}, scaled (Wh)", f"{tokens}, scaled (h)"),
        *(f"paper, {paper['device']}: {figure}" for figure in ("memory (GB)", "tokens/s", "Wh")),
    ]
    records = [store.load(path.parent) for path in folder.glob(f"*/{store.RECORD}")]
    return common.markdown([titles, *(_cells(record) for record in sorted(records, key=_order))])


def _order(record: Record) -> tuple[int, int]:
    names = [*PAPER, *OTHERS]
    name = _method(record)
    return names.index(name) if name in names else len(names), _batch(record)


def _method(record: Record) -> str:
    quant = facts.quant(record)
    return f"none_{record.config['dtype']}" if quant == "none" else quant


def _batch(record: Record) -> int:
    return int(record.config["engine"]["batch_size"])


def _cells(record: Record) -> list[str]:
    def cell(key: str, digits: int) -> str:
        return common.text(record.readings.get(key), digits)

    decode = "decode_tokens_per_second"
    extremes = [cell(f"{decode}_{end}", 1) for end in ("min", "max")]
    said = published.counterpart(record) if _batch(record) == 1 else None
    keys = ("vram_gb", "tokens_per_second", "energy_wh")
    return [
        _method(record) if record.status == "ok" else f"{_method(record)} ({record.status.replace('_', ' ')})",
        str(_batch(record)),
        facts.kernel(record) or common.DASH,
        *(cell(key, 2) for key in ("torch_allocated_peak", "process_memory_peak")),
        *(
            cell("time_to_first_token", 3),
            cell(f"{decode}_median" if common.has(record, f"{decode}_median") else decode, 1),
        ),
        common.DASH if common.DASH in extremes else "–".join(extremes),
        *(cell("output_tokens_per_second", 1), cell("energy_per_token", 2)),
        *(common.text(published.scaled_energy(record), 1), common.text(published.scaled_time(record), 2)),
        *(common.DASH if said is None or said[key] is None else f"{said[key]:.2f}" for key in keys),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="measure, and keep each row's record below this folder")
    what.add_argument("--table", type=Path, metavar="FOLDER", help="print the table of the records in this folder")
    names = [*PAPER, *OTHERS]
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="ROW", help=", ".join(names))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64, 4], metavar="N", help="in this order")
    parser.add_argument("--minutes", type=float, default=60, help="start no row after so many (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="after --: overrides for every row, such as repeats=2")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return 0
    if not present_gpus() and "gpu=cpu" not in args.overrides:
        print("table1.py needs a CUDA GPU, and none is visible", file=sys.stderr)
        return 2
    return measure(args)


if __name__ == "__main__":
    sys.exit(main())
