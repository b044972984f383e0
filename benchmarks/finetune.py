"""Optimizer steps a second of fine-tuning: trainer=fast against transformers + PEFT, as usual and at their best.

    python benchmarks/finetune.py --out results/h100/finetune --minutes 8        # Llama-2-7B's shape, random weights
    python benchmarks/finetune.py --out FOLDER --model tiny --tokens 64 --steps 4 -- gpu=cpu   # a try, anywhere
    python benchmarks/finetune.py --table results/h100/finetune

A step is 8 conversations of 500 random tokens. ``default`` is the paper's protocol in a plain loop: 8 micro-batches
of 1, torch's AdamW. ``best_documented`` is one batch of 8 (or the largest that does not run out of memory, then with
layers recomputed) and the fused AdamW. ``ours`` is the product's own train.py task, with the micro-batch that the
planner chose. All start from the same saved adapter. Their losses are compared first: a row whose losses differ has
no figure. Then they run in turn, several rounds; figures are medians over all steps after the warm-up, energy is the
card's, gross. Rows of one base share a process and its weights; a row within a budget runs under that card's memory,
its references too. The limit is the longer of the model's FLOPs over the fastest plain matrix product, and of the
bytes that a step has to move over a copy's bandwidth, both measured in the same process. Every round is written at
once; what is there is not run again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rows as common

from llm_at_home.metering.timing import mean_interval95

TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 4}
# A T4's memory, and 6 GB, around a chip with bfloat16.
BUDGETS = {16: ["gpu=t4", "gpu.compute_capability='8.0'"]}
BUDGETS |= {6: ["gpu=t4", "gpu.memory=6.0", "gpu.compute_capability='8.0'"]}
SMALLEST = ["memory=smallest", "optimizer=paged_adamw_8bit", "adapter.r=8"]
# By name: what shares a process, the method, overrides, and the budget in GB.
WORK: dict[str, tuple[str, str, list[str], int | None]] = {
    "lora": ("none", "LoRA, rank 64", ["quant=none", "adapter=lora"], None),
    "qlora": ("nf4", "Q-LoRA nf4, rank 64", ["quant=nf4", "adapter=lora"], None),
    "lokr": ("none", "LoKr, rank 128", ["quant=none", "adapter=lokr"], None),
    "adalora": (
        "none",
        "AdaLoRA, rank 64 to 48",
        ["quant=none", "adapter=adalora", "adapter.init_r=64", "adapter.target_r=48"],
        None,
    ),
    "qlora_16gb": ("nf4_16", "Q-LoRA nf4, rank 64", ["quant=nf4", "adapter=lora"], 16),
    "qlora_6gb": ("nested_6", "Q-LoRA nf4_nested, rank 8", ["quant=nf4_nested", "adapter=lora", *SMALLEST], 6),
}
GOALS = {"default": 7.5, "best_documented": 1.6}
GOAL_TO_LORA = 0.9  # of AdaLoRA and LoKr
REFERENCES = ("default", "best_documented")
# Relative difference of losses that rounding explains.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3, "float16": 5e-3}
# Bytes that AdamW moves for each trained value: weight, gradient and two moments read, weight and moments written.
OPTIMIZER_BYTES = 28


def compose(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The resolved configuration of one row."""
    from hydra import compose, initialize_config_dir

    from llm_at_home.tasks import resolve

    _, _, words, budget = WORK[name]
    steps = args.steps + 2
    words = [
        *("data=synthetic", "logger=none", "model.weights=random", "trainer=fast", *words),
        *(f"data.max_length={args.tokens}", "data.batch_size=1", f"callbacks.accumulation.steps={args.batch}"),
        *(f"trainer.max_steps={steps}", f"limit={args.batch * steps}", f"data.conversations={args.batch * steps}"),
        *_model(args),
        *args.overrides,
        *(BUDGETS[budget] if budget else []),  # last: a gpu= that was asked for would take the card's memory
    ]
    if "gpu=cpu" in args.overrides:
        # The planner knows GPUs alone.
        words += ["trainer.micro_batch=null", f"data.batch_size={args.batch}", "callbacks.accumulation.steps=1"]
    with initialize_config_dir(str(common.ROOT / "conf"), version_base="1.3"):
        config = resolve.resolve("train", compose("train", words), words)
    resolve.check("train", config)
    return config


def _model(args: argparse.Namespace) -> list[str]:
    if args.model != "tiny":
        return [f"model={args.model}", "dtype=bfloat16"]
    shape = [f"model.architecture.{key}={value}" for key, value in TINY.items()]
    return ["model=llama2_7b", "dtype=float32", *shape]


def work(args: argparse.Namespace) -> None:
    """Rows of one base, in this process."""
    from llm_at_home.hardware.emulation import cap_memory
    from llm_at_home.quantization.base import load_base

    base: Any = None
    for name in args.work:
        if time.time() > args.until:
            print(f"the time is up before {name}: the same command goes on with it", flush=True)
            return
        config = compose(args, name)
        if base is None:
            emulation = cap_memory(config["gpu"]) if config["gpu"]["device"] == "cuda" else None
            base = load_base(config)
        _measure(args, name, config, base, emulation)


def _measure(args: argparse.Namespace, name: str, config: dict[str, Any], base: Any, emulation: Any) -> None:
    import finetune_contenders as contenders

    from llm_at_home.quantization.base import describe_kernel
    from llm_at_home.records.provenance import collect

    _, method, _, budget = WORK[name]
    file = args.out / f"{name}.json"
    result: dict[str, Any] = {
        "name": name,
        "method": method,
        "budget_gb": budget,
        "protocol": {key: getattr(args, key) for key in ("model", "tokens", "batch", "steps", "rounds")},
        "planned": config.get("planned"),
        "kernel": describe_kernel(base),
        "emulation": emulation,
        "provenance": collect(),
        "done": False,
        "rounds": {who: [] for who in (*REFERENCES, "ours")},
    }
    with tempfile.TemporaryDirectory(prefix="start_") as folder:
        contenders.start(base, config, Path(folder))
        result["limit"] = limit(args, config, base, Path(folder))
        for turn in range(args.rounds):
            order = [*REFERENCES, "ours"] if turn % 2 == 0 else ["ours", *REFERENCES[::-1]]
            for who in order:
                if turn and "seconds" not in result["rounds"][who][-1]:
                    continue  # it ran out of memory
                steps = {"default": max(2, args.steps // 8), "best_documented": max(2, args.steps // 2)}
                if who == "ours":
                    one = contenders.ours(base, args, config, Path(folder), args.steps)
                else:
                    one = contenders.reference(base, who, args, config, Path(folder), steps[who])
                result["rounds"][who].append(one)
                common.write(result, file)
                print(f"{name} {who}: {_said(one)}", flush=True)
            if turn == 0:
                result["loss_difference"] = _differences(result)
                common.write(result, file)
                worst = max(result["loss_difference"].values(), default=0.0)
                if not worst <= TOLERANCE[config["dtype"]]:
                    result["reason"] = f"the losses differ by {worst:.2g}, more than rounding explains"
                    break
        if args.profile and "reason" not in result:
            result["profile"] = contenders.ours(base, args, config, Path(folder), 2, profile=True)
    result["done"] = True
    common.write(result, file)


def _differences(result: dict[str, Any]) -> dict[str, float]:
    import finetune_contenders as contenders

    rounds = result["rounds"]
    ours = rounds["ours"][0].get("losses", [])
    wanted = {who: rounds[who][0]["losses"] for who in REFERENCES if "losses" in rounds[who][0]}
    return {who: contenders.apart(ours, losses) for who, losses in wanted.items()} if ours else {}


def _said(one: dict[str, Any]) -> str:
    if "reason" in one:
        return str(one["reason"])
    rate = 1 / statistics.median(one["seconds"])
    losses = ", ".join(f"{loss:.5f}" for loss in one["losses"][:3])
    return f"{rate:.3f} steps/s ({one['setting']}), first step {one['first_step_seconds']:.1f} s, losses {losses}"


def limit(args: argparse.Namespace, config: dict[str, Any], base: Any, folder: Path) -> dict[str, Any]:
    """Steps a second if the card did nothing but the model's own work, as fast as it can."""

    from llm_at_home.adapters.attach import prepare_for_training, trainable_parameters
    from llm_at_home.metering.matmul import dense_peak
    from llm_at_home.quantization.size import size_readings
    from llm_at_home.training.flops import ModelFlops

    device, tokens = config["gpu"]["device"], args.batch * args.tokens
    peak, bandwidth = dense_peak(device, config["dtype"]), common.copy_bandwidth(device)
    weights = (size_readings(base)["model_size"].value or 0.0) * 1e9
    with common.bare(base):
        model = prepare_for_training(base, config["adapter"], folder)
        flops = ModelFlops.of(model).of_tokens(tokens, args.batch * args.tokens * (args.tokens + 1) / 2)
        # Every weight is read forth and back.
        moved = 2 * weights + OPTIMIZER_BYTES * trainable_parameters(model)
        del model
    seconds = [flops / (peak.value * 1e12)] if peak.value else []
    seconds += [moved / bandwidth] if bandwidth else []
    return {
        "flops": flops,
        "bytes": moved,
        "peak_tflops": peak.value,
        "bandwidth": bandwidth,
        "steps_per_second": 1 / max(seconds) if seconds else None,
    }


def rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each result and reference, ours first; what could not be measured is null, with the reason."""
    import finetune_contenders as contenders

    lora = next((r for r in results if r["name"] == "lora" and not r.get("reason")), None)
    lora_pace = contenders.pace(lora["rounds"]["ours"]) if lora else None
    found = []
    for result in results:
        protocol, rounds = result["protocol"], result["rounds"]
        correct = "reason" not in result
        pace = contenders.pace(rounds["ours"]) if correct else None
        ceiling = result["limit"]["steps_per_second"]
        peaks = [one["peak_gb"] for one in rounds["ours"] if one.get("peak_gb")]
        for who in REFERENCES:
            theirs = contenders.pace(rounds[who])
            row = {
                "work": f"fine-tuning, {protocol['model']}, {protocol['batch']} x {protocol['tokens']} tokens a step",
                "method": result["method"],
                "ours": pace,
                "ours_interval95": _interval(rounds["ours"]) if correct else None,
                "reference": theirs,
                "reference_interval95": _interval(rounds[who]),
                "reference_name": who,
                "unit": "steps/s",
                "ratio": pace / theirs if pace and theirs else None,
                "share_of_limit": pace / ceiling if pace and ceiling else None,
                "joules": _median(rounds["ours"], "joules") if correct else None,
                "reference_joules": _median(rounds[who], "joules"),
                "peak_gb": max(peaks) if peaks and correct else None,
                "budget_gb": result["budget_gb"],
                "goal": GOALS[who] if not result["budget_gb"] else None,
                "setting": _setting(rounds["ours"]),
                "reference_setting": _setting(rounds[who]),
                "first_step_seconds": [one.get("first_step_seconds") for one in rounds["ours"]],
                "reason": result.get("reason") or _reason(rounds["ours"]) or _reason(rounds[who]),
            }
            if result["name"] in ("adalora", "lokr"):
                row["ratio_to_lora"] = pace / lora_pace if pace and lora_pace else None
                row["goal_to_lora"] = GOAL_TO_LORA
            found.append(row)
    return found


def _interval(rounds: Sequence[dict[str, Any]]) -> list[float] | None:
    """Of the mean over the measured steps of all rounds, in steps a second."""
    ends = mean_interval95([seconds for one in rounds for seconds in one.get("seconds", [])])
    return [1 / ends[1], 1 / ends[0]] if ends and ends[0] > 0 else None


def _median(rounds: Sequence[dict[str, Any]], key: str) -> float | None:
    known = [one[key] for one in rounds if one.get(key) is not None]
    return statistics.median(known) if known else None


def _setting(rounds: Sequence[dict[str, Any]]) -> str | None:
    return rounds[-1].get("setting") if rounds else None


def _reason(rounds: Sequence[dict[str, Any]]) -> str | None:
    return next((one["reason"] for one in rounds if "reason" in one), None)


def table(folder: Path) -> str:
    """The rows of a folder as Markdown."""
    lines = [["method", "budget (GB)", "ours (steps/s)", "setting", "reference", "its setting", "its steps/s", "ratio"]]
    lines[0] += ["goal", "share of limit", "J/step", "its J/step", "peak (GB)", "first step (s)", "note"]
    for row in rows(common.stored(folder, WORK)):
        first = row["first_step_seconds"]
        lines.append(
            [
                row["method"],
                common.number(row["budget_gb"], 0),
                common.number(row["ours"], 2),
                row["setting"] or common.DASH,
                row["reference_name"],
                row["reference_setting"] or common.DASH,
                *(common.number(row[key], 2) for key in ("reference", "ratio", "goal", "share_of_limit")),
                *(common.number(row[key], 0) for key in ("joules", "reference_joules")),
                common.number(row["peak_gb"], 1),
                common.number(first[0] if first else None, 1),
                (row["reason"] or "").split(". ")[0],  # torch goes on with what the allocator holds
            ]
        )
    return "\n\n".join([common.markdown(lines), *_where(folder)])


def _where(folder: Path) -> list[str]:
    """Where the time of our steps goes, of the rows that were profiled, as a Markdown table."""
    import finetune_contenders as contenders
    import profiled

    kinds = (*profiled.KINDS, profiled.OTHER)
    lines = [["method", "budget (GB)", *(f"{kind} (ms)" for kind in kinds), "sum (ms)", "step (ms)"]]
    for result in common.stored(folder, WORK):
        found = result.get("profile", {}).get("where")
        pace = contenders.pace(result["rounds"]["ours"])
        if not found or not pace:
            continue
        seconds = found["seconds"]
        shown = [*(seconds.get(kind, 0.0) for kind in kinds), sum(seconds.values()), 1 / pace]
        cells = [common.number(1000 * value, 1) for value in shown]
        lines.append([result["method"], common.number(result["budget_gb"], 0), *cells])
    return [common.markdown(lines)] if lines[1:] else []


def _missing(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    done = {result["name"] for result in common.stored(args.out, WORK) if result["done"]}
    return [name for name in names if name not in done]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="measure, a file a row into this folder, and rows.json")
    what.add_argument("--table", type=Path, metavar="FOLDER", help="print the table of such a folder")
    parser.add_argument("--model", default="llama2_7b", help="of conf/model, or tiny (default: %(default)s)")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK), metavar="ROW", help=", ".join(WORK))
    parser.add_argument("--tokens", type=int, default=500, help="of each conversation (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="conversations in a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="measured steps of ours in a round, fewer of the others")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="two more steps of ours, to see where their time goes")
    parser.add_argument("--minutes", type=float, default=60, help="start no row after so many (default: %(default)s)")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of the process that does the work
    parser.add_argument("overrides", nargs="*", help="after --: overrides for every row, such as gpu=cpu")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    if args.until:
        work(args)
        return 0
    return _measure_all(args)


def _measure_all(args: argparse.Namespace) -> int:
    """Rows that are not there, those of one base in one process; 1 when some are left."""
    from llm_at_home.tasks.launch import CHILD_ENVIRONMENT

    until = time.time() + args.minutes * 60
    names = [name for name in args.work if not (WORK[name][3] and "gpu=cpu" in args.overrides)]
    for name in set(args.work) - set(names):
        print(f"{name}: left out, a budget is a GPU's")
    for base in dict.fromkeys(WORK[name][0] for name in names):
        todo = _missing(args, [name for name in names if WORK[name][0] == base])
        if not todo or time.time() > until:
            continue
        options = [f"--{key}={getattr(args, key)}" for key in ("out", "model", "tokens", "batch", "steps", "rounds")]
        options += ["--profile"] * args.profile
        command = [sys.executable, sys.argv[0], *options, f"--until={until}", "--work", *todo, "--", *args.overrides]
        subprocess.run(command, env={**os.environ, **CHILD_ENVIRONMENT}, check=False)
    common.write({"rows": rows(common.stored(args.out, WORK))}, args.out / "rows.json")
    print(table(args.out))
    left = _missing(args, names)
    print(f"not there: {', '.join(left)}" if left else "all rows are there")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
