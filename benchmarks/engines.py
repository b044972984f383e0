"""The engines side by side without a GPU: transformers' generate, the static cache, llama.cpp; one answer and eight.

    python benchmarks/engines.py --out results/two_core_cpu/engines
    python benchmarks/engines.py --table results/two_core_cpu/engines

The same greedy answers to home_bench's questions, as many tokens each at most, by ``infer.py`` in a process of its own,
in two rounds, the second in the opposite order. A ratio is that of the slower round's figures over the reference's
faster, so that it is not too good: engine=eager of the same weights, and of llama.cpp's files that of the dense weights
they stand beside. What is there is not run again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import rows as common

from llm_at_home.records import store
from llm_at_home.records.schema import Record
from llm_at_home.reporting import facts

WEIGHTS = {
    "float32": ["quant=none", "dtype=float32"],
    "bfloat16": ["quant=none", "dtype=bfloat16"],
    "int8": ["quant=int8"],
    "nf4": ["quant=nf4"],
}
FILES = {"F32": "float32", "BF16": "bfloat16", "Q8_0": "int8", "Q4_0": "nf4"}  # and what they stand beside
EAGER = "eager"
HEADLINE = ("decode_tokens_per_second", "time_to_first_token", "resident_set_peak")
COUNTS = (1, 8)


def rows(args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """Name and command of each row, in the order of running."""
    ways = {f"{EAGER}_{name}": [f"engine={EAGER}", *words] for name, words in WEIGHTS.items()}
    ways |= {f"graph_{name}": ["engine=graph", *words] for name, words in WEIGHTS.items() if name != "int8"}
    ways |= {f"llamacpp_{kind}": ["quant=gguf", f"quant.type={kind}"] for kind in FILES}
    shared = ["infer.py", "gpu=cpu", "logger=none", "questions=home_bench", "engine.temperature=0"]
    shared += [f"engine.max_new_tokens={args.tokens}", f"engine.warmup_tokens={args.tokens}"]
    found = []
    for count in COUNTS:
        for turn in range(args.rounds):
            for name, words in list(ways.items())[:: -1 if turn % 2 else 1]:
                batch = [f"engine.batch_size={count}", f"limit={count}"]
                found.append((f"{name}_b{count}_{turn}", [*shared, *words, *batch, *args.overrides]))
    return found


def table(folder: Path) -> str:
    """The records below a folder as a Markdown table."""
    groups: dict[tuple[int, str], list[Record]] = {}
    for path in sorted(folder.glob(f"*/{store.RECORD}")):
        name, count, _ = path.parent.name.rsplit("_", 2)
        groups.setdefault((int(count.removeprefix("b")), name), []).append(store.load(path.parent))
    lines = [["at once", "engine", "weights", "kernel", "decode (tokens/s)", "to eager, at least"]]
    lines[0] += ["first token (s)", "with prompts (tokens/s)", "resident set, peak (GB)"]
    for (count, name), records in sorted(groups.items()):
        engine, weights = name.split("_", 1)
        reference = groups.get((count, f"{EAGER}_{FILES.get(weights, weights)}"), [])
        ours, theirs = (_values(some, "decode_tokens_per_second") for some in (records, reference))
        ratio = min(ours) / max(theirs) if ours and theirs and engine != EAGER else None
        lines.append(
            [
                *(str(count), engine, weights, facts.kernel(records[0]) or common.DASH),
                _both(ours, 1),
                common.number(ratio, 2),
                _both(_values(records, "time_to_first_token"), 2),
                _both(_values(records, "output_tokens_per_second"), 1),
                common.number(max(_values(records, "resident_set_peak"), default=None), 2),
            ]
        )
    return common.markdown(lines)


def _values(records: list[Record], key: str) -> list[float]:
    readings = (record.readings.get(key) for record in records)
    return [reading.value for reading in readings if reading is not None and reading.value is not None]


def _both(values: list[float], digits: int) -> str:
    return ", ".join(common.number(value, digits) for value in values) or common.DASH


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="measure, and keep each row's record below this folder")
    what.add_argument("--table", type=Path, metavar="FOLDER", help="print the table of such a folder")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer, at most (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60, help="start no row after so many (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="after --: overrides for every row")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return 0
    failed = common.run_rows(rows(args), args.out, args.minutes, HEADLINE)
    print(table(args.out))
    return failed


if __name__ == "__main__":
    sys.exit(main())
