"""Every quantization method that runs on this machine, what it costs and what it loses, on the embedded model.

    python benchmarks/methods.py --out results/two_core_cpu/methods
    python benchmarks/fidelity_table.py results/two_core_cpu/methods

A row is one ``infer.py experiment=methods`` (speed, memory, kernel) and one ``evaluate.py experiment=fidelity`` (what
is lost; ``--halves fidelity`` for these alone, which several commands may run at once, since nothing is timed), each in
a process of its own. What is there is not run again: the same command goes on where it stopped.
Checkpoints are made first where the cache lacks them: minutes each for GPTQ and AWQ. The table of all rows is the
report's (``make report``, ``make readme``); ``fidelity_table.py`` adds paired comparisons.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import rows as common

METHODS = {
    "none_float32": ["quant=none", "dtype=float32"],
    "none_bfloat16": ["quant=none", "dtype=bfloat16"],
    "int8": ["quant=int8"],
    "int8_torchao": ["quant=int8_torchao"],
    "nf4": ["quant=nf4"],
    "nf4_nested": ["quant=nf4_nested"],
    "fp4": ["quant=fp4"],
    "int4_torchao": ["quant=int4_torchao"],
    **{f"rtn_{bits}": ["quant=rtn", f"quant.bits={bits}"] for bits in (8, 4, 3, 2)},
    # In the dtype of GPTQ's kernels, to be compared with it pair by pair.
    **{f"rtn_{bits}_bfloat16": ["quant=rtn", f"quant.bits={bits}", "dtype=bfloat16"] for bits in (4, 3)},
    **{
        f"rtn_{bits}_sym_bfloat16": ["quant=rtn", f"quant.bits={bits}", "quant.scheme=symmetric", "dtype=bfloat16"]
        for bits in (4, 3)
    },
    **{f"gptq_{bits}": ["quant=gptq", f"quant.bits={bits}"] for bits in (8, 4, 3, 2)},
    **{f"gptq_{bits}_asym": ["quant=gptq", f"quant.bits={bits}", "quant.sym=false"] for bits in (4, 3)},
    "gptq_mixed_4.0": ["quant=gptq_mixed"],
    "gptq_mixed_3.5": ["quant=gptq_mixed", "quant.target_bits=3.5"],
    "awq": ["quant=awq"],
    **{f"gguf_{kind}": ["quant=gguf", f"quant.type={kind}"] for kind in ("Q8_0", "Q5_1", "Q4_1", "Q4_0")},
    **{f"gguf_{kind}": ["quant=gguf", f"quant.type={kind}"] for kind in ("Q6_K", "Q4_K_M", "Q3_K_M", "Q2_K")},
}
HALVES = {
    "infer": (["infer.py", "experiment=methods"], ["decode_tokens_per_second", "resident_set_peak"], []),
    "fidelity": (
        ["evaluate.py", "experiment=fidelity", "logger=none"],
        ["kl_divergence_mean", "top1_agreement"],
        ["fidelity.jsonl"],
    ),
}


def measure(args: argparse.Namespace) -> int:
    """Run what is not there yet; 1 when something left no usable record."""
    deadline = time.monotonic() + args.minutes * 60
    failed = False
    for name in args.rows:
        for half, (command, headline, keep) in ((half, HALVES[half]) for half in args.halves):
            folder = args.out / name
            if common.status(folder / half) in common.DONE:
                continue
            if time.monotonic() > deadline:
                print(f"{args.minutes:g} minutes are up: the same command goes on with {name}")
                return int(failed)
            words = [*command, *METHODS[name], *args.overrides]
            print(name, common.run_row(half, words, folder, headline, keep), flush=True)
            failed |= common.status(folder / half) not in common.DONE
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="keep each row's records below this folder")
    parser.add_argument("--rows", nargs="+", choices=METHODS, default=list(METHODS), metavar="ROW")
    parser.add_argument("--halves", nargs="+", choices=HALVES, default=list(HALVES), metavar="HALF")
    parser.add_argument("--minutes", type=float, default=600, help="start nothing after so many (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="after --: overrides for every run, such as gpu=cpu")
    return measure(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
