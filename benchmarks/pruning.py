"""What pruning loses, and what a GPU's 2:4 kernel gains by it.

    python benchmarks/pruning.py --out results/two_core_cpu/pruning -- gpu=cpu
    python benchmarks/pruning.py --table results/two_core_cpu/pruning
    python benchmarks/pruning.py --speed --out results/h100/pruning
    python benchmarks/pruning.py --speed --table results/h100/pruning

What it loses: each row is one run of ``evaluate.py task=fidelity`` on the embedded model, in a process of its own,
against the model before it was pruned, on held-out passages that share nothing with the calibration text. Rows that are
there are not run again.

What it gains (``--speed``, on a GPU of compute capability 8.0 and 24 GB): matrices of Llama-2-7B's shapes, dense and
2:4, by the number of tokens that they are multiplied with, in ``kernels.json``; and the whole model with random
weights, the same zeros in both, answering 16 prompts at once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import rows as common

from llm_at_home.evaluation.fidelity import ROWS as PASSAGES
from llm_at_home.hardware.present import present_gpus
from llm_at_home.records import provenance, store
from llm_at_home.records.schema import Record
from llm_at_home.reporting import facts

METHODS = ("magnitude", "wanda", "sparsegpt")
SHAPES = {"25": ["prune.sparsity=0.25"], "50": ["prune.sparsity=0.5"], "2_4": ["prune.pattern=2:4"]}
QUALITY = {"none": ["prune=none"]}
QUALITY |= {f"{name}_{key}": [f"prune={name}", *words] for key, words in SHAPES.items() for name in METHODS}
FIDELITY = ["evaluate.py", "task=fidelity", "fidelity.answer_tokens=0", "logger=none"]
LOST = ("perplexity", "kl_divergence_mean", "top1_agreement", "pruning_time")

SPEED = {name: [f"prune.kernel={name}"] for name in ("dense", "semi_structured")}
INFER = ["infer.py", "experiment=table1", "prune=magnitude", "prune.pattern=2:4", "dtype=bfloat16", "gpu=cuda"]
INFER += ["engine=eager", "engine.batch_size=16", "engine.max_new_tokens=64", "repeats=2"]
GAINED = ("torch_allocated_peak", "prefill_tokens_per_second", "decode_tokens_per_second")
KERNELS = "kernels.json"
# Outputs and inputs of Llama-2-7B's matrices: attention's, the MLP's way in and its way out.
MATRICES = ((4096, 4096), (11008, 4096), (4096, 11008))
TOKENS = (1, 16, 64, 256, 1024, 4096)


def table(folder: Path) -> str:
    """What each pruning lost, by the records below a folder, as a Markdown table."""
    titles = ["pruning", "zeros (%)", "perplexity", "perplexity / before", "KL divergence, mean (nats/token)"]
    lines = [[*titles, "its 95 % interval", "top-1 agreement (%)", "making (s)"]]
    for name in QUALITY:
        if common.status(folder / name) is None:
            continue
        record = store.load(folder / name)
        divergence = record.quality.get("kl_divergence_mean")
        ends = divergence.interval95 if divergence else None
        lines.append(
            [
                (", ".join(facts.pruning(record)) or "none") + ("" if record.status == "ok" else f" ({record.status})"),
                common.text(_percent(record, "sparsity"), 1),
                common.text(record.quality.get("perplexity"), 2),
                common.text(record.quality.get("perplexity_ratio"), 3),
                common.text(divergence, 4),
                f"{ends[0]:.4f}–{ends[1]:.4f}" if ends else common.DASH,
                common.text(_percent(record, "top1_agreement"), 1),
                common.text(record.readings.get("pruning_time"), 0),
            ]
        )
    return common.markdown(lines)


def _percent(record: Record, key: str) -> Any:
    reading = {**record.readings, **record.quality}.get(key)
    if reading is None or reading.value is None:
        return None
    return type(reading)(100 * reading.value, "%", reading.method)


def speed_table(folder: Path) -> str:
    """What 2:4 gained on a GPU, by ``kernels.json`` and the records below a folder, as two Markdown tables."""
    lines = [["outputs x inputs", "tokens", "dense (us)", "2:4 (us)", "dense / 2:4", "relative difference"]]
    measured = json.loads((folder / KERNELS).read_text(encoding="utf-8"))
    for row in measured["rows"]:
        shape = [f"{row['outputs']} x {row['inputs']}", str(row["tokens"])]
        if row["error"]:
            lines.append([*shape, f"{row['dense_us']:.1f}", row["error"], common.DASH, common.DASH])
            continue
        times = [f"{row[key]:.1f}" for key in ("dense_us", "sparse_us")]
        lines.append([*shape, *times, f"{row['dense_us'] / row['sparse_us']:.2f}", f"{row['relative_difference']:.1e}"])
    whole = [["kernel", "layers", "in memory (GB)", "torch allocated, peak (GB)", "first token (s)"]]
    whole[0] += ["prefill (tokens/s)", "decode (tokens/s)"]
    keys = (("model_size", 2), ("torch_allocated_peak", 2), ("time_to_first_token", 3))
    keys += (("prefill_tokens_per_second", 0), ("decode_tokens_per_second", 1))
    for name in SPEED:
        if common.status(folder / name) is not None:
            record = store.load(folder / name)
            figures = [common.text(record.readings.get(key), digits) for key, digits in keys]
            whole.append([name, facts.kernel(record) or common.DASH, *figures])
    return f"{common.markdown(lines)}\n\n{common.markdown(whole)}"


def measure_kernels(out: Path) -> None:
    """Time each matrix, dense and 2:4, eagerly as a model calls it, and write ``kernels.json``."""
    import torch

    from llm_at_home.pruning import magnitude, semi_structured
    from llm_at_home.pruning.pattern import Pattern

    pattern, measured = Pattern(0.5, 2, 4), []
    torch.manual_seed(0)
    with torch.no_grad():
        for outputs, inputs in MATRICES:
            weight = torch.empty(outputs, inputs, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
            dense = torch.nn.Linear(inputs, outputs, bias=False, device="meta")
            dense.weight = torch.nn.Parameter(magnitude.prune(weight, None, pattern, {}), requires_grad=False)
            sparse = torch.nn.Linear(inputs, outputs, bias=False, device="meta")
            sparse.weight = semi_structured.sparse(dense.weight)
            for tokens in TOKENS:
                x = torch.randn(1, tokens, inputs, dtype=torch.bfloat16, device="cuda")
                row = {"outputs": outputs, "inputs": inputs, "tokens": tokens, "dense_us": _microseconds(dense, x)}
                row |= {"sparse_us": None, "relative_difference": None, "error": None}
                try:
                    expected, found = dense(x).float(), sparse(x).float()
                    row["relative_difference"] = float((found - expected).norm() / expected.norm())
                    row["sparse_us"] = _microseconds(sparse, x)
                except (RuntimeError, NotImplementedError) as error:
                    row["error"] = facts.clean(str(error).splitlines()[0])
                measured.append(row)
    kernel = type(sparse.weight).__name__
    content = {"kernel": kernel, "dtype": "bfloat16", "rows": measured, "provenance": provenance.collect()}
    store.write_json(out / KERNELS, content)
    print(f"{KERNELS}: {len(measured)} rows, {kernel}", flush=True)


def _microseconds(layer: Any, x: Any, calls: int = 30) -> float:
    """Microseconds a call, the median of five rounds of so many calls, after one that is not timed."""
    import torch

    rounds = []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            layer(x)
        end.record()
        torch.cuda.synchronize()
        rounds.append(1000 * start.elapsed_time(end) / calls)
    return sorted(rounds[1:])[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="measure, and keep each row's record below this folder")
    what.add_argument("--table", type=Path, metavar="FOLDER", help="print the tables of the records in this folder")
    parser.add_argument("--speed", action="store_true", help="what a GPU's 2:4 kernel gains, instead of what is lost")
    parser.add_argument("--kernels", action="store_true", help="single matrices alone, which --speed begins with")
    parser.add_argument("--rows", nargs="+", choices=[*QUALITY, *SPEED], metavar="ROW", help="these alone")
    parser.add_argument("--minutes", type=float, default=60, help="start nothing after so many (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="after --: overrides for every run, such as gpu=cpu")
    args = parser.parse_args()
    if args.kernels:
        measure_kernels(args.out)
        return 0
    if args.table:
        print(speed_table(args.table) if args.speed else table(args.table))
        return 0
    rows, command, headline = (SPEED, INFER, GAINED) if args.speed else (QUALITY, FIDELITY, LOST)
    if args.speed:
        if not present_gpus():
            print("pruning.py --speed needs a CUDA GPU, and none is visible", file=sys.stderr)
            return 2
        if not (args.out / KERNELS).is_file():
            # In a process of its own, so that the card is free for the rows.
            subprocess.run([sys.executable, __file__, "--kernels", "--out", str(args.out)], check=True)
    commands = [(name, [*command, *rows[name], *args.overrides]) for name in args.rows or rows if name in rows]
    return common.run_rows(commands, args.out, args.minutes, headline, keep=() if args.speed else (PASSAGES,))


if __name__ == "__main__":
    sys.exit(main())
