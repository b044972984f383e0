"""The memory planner against the card: predicted and measured peaks of training and inference on one GPU.

    python benchmarks/planner.py --out results/h100/planner --minutes 8     # an H100
    python benchmarks/planner.py --table results/h100/planner               # predicted against measured, anywhere
    python benchmarks/planner.py --article                                  # beside the article's figures
    python benchmarks/planner.py --cards                                    # largest model, longest context by card
    python benchmarks/planner.py --fit                                      # the constants that were fitted
    python benchmarks/planner.py --out FOLDER --tiny -- gpu=cpu              # a try without a GPU

Llama-2-7B's shape with random weights unless a row names another: memory is true, the loss is not. Rows of one base
share a process and its loaded weights: each row starts from the base alone, with the allocator emptied and its peaks
reset, and is the product's own ``train.py`` or ``infer.py`` from there on. Where a row has left anything on the card,
the next one gets a new process. Rows named ``limit_`` are what the
planner says just trains on a smaller card, and run under that card's memory. Every row leaves ``OUT/<row>/record.json``
at once; what is there (out of memory is a result) is not run again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import planner_rows
import rows as common

from llm_at_home.hardware.present import present_gpus
from llm_at_home.planning.allocator import constants
from llm_at_home.planning.inference import predict_inference
from llm_at_home.planning.training import predict_training
from llm_at_home.records import store
from llm_at_home.records.schema import Record
from llm_at_home.reporting import published

MEMORY = ("torch_allocated_peak", "torch_reserved_peak", "process_memory_peak")


def table(folders: list[Path]) -> str:
    """Predicted and measured peaks of the records below these folders, as Markdown.

    A row is named by its folder too where several folders have one of its name.
    """
    titles = ["row"]
    for key in MEMORY:
        titles += [f"{key.replace('_', ' ')} (GB)", "predicted", "error (%)"]
    lines = [[*titles, "peak at"]]
    worst: dict[str, list[float]] = {key: [] for key in MEMORY}
    found = [path.parent for folder in folders for path in sorted(folder.glob("*/record.json"))]
    clash = len({path.name for path in found}) < len(found)
    for path in found:
        record, row = store.load(path), f"{path.parent.name}/{path.name}" if clash else path.name
        if record.status != "ok":
            lines.append([f"{row} ({record.status})", *[common.DASH] * (3 * len(MEMORY) + 1)])
            continue
        prediction = predict(record)
        said = dict(zip(MEMORY, (prediction.allocated, prediction.reserved, prediction.process), strict=True))
        cells = []
        for key in MEMORY:
            reading = record.readings.get(key)
            if reading is None or reading.value is None:
                cells += [common.DASH, f"{said[key] / 1e9:.2f}", common.DASH]
                continue
            error = 100 * (said[key] / 1e9 / reading.value - 1)
            worst[key].append(abs(error))
            cells += [f"{reading.value:.2f}", f"{said[key] / 1e9:.2f}", f"{error:+.1f}"]
        lines.append([row, *cells, prediction.moment])
    summary = [f"{key}: largest error {max(found):.1f} %, n = {len(found)}" for key, found in worst.items() if found]
    return "\n".join([common.markdown(lines), "", *summary])


def article() -> str:
    """The company article's figures beside the planner's, as Markdown; no GPU is needed."""
    said = published.article_memory()
    lines = [
        ["", "article (GB)", "weights, predicted (GB)", "one answer of 512 + 1024 tokens, process, predicted (GB)"]
    ]
    for row in said["rows"]:
        cells = [row["name"], f"{row['gb']:g}", common.DASH, common.DASH]
        if row["model"]:
            plan = _plan(f"model={row['model']}", f"quant={row['quant']}", "task=infer", "questions.prompt_tokens=512")
            cells[2:] = [f"{plan.parts['weights'].value:.1f}", f"{plan.prediction.process / 1e9:.1f}"]
        lines.append(cells)
    rule = [["every weight trained", "12 x billions (GB)"]]
    rule[0] += [f"{dtype}, {name}, process, predicted (GB)" for dtype, name, _ in FULL]
    for model in ("smollm2_135m", "qwen2_5_1_5b", "llama2_7b", "llama2_13b", "llama2_70b"):
        cells = [model]
        for dtype, _, words in FULL:
            plan = _plan(f"model={model}", "quant=none", "adapter=full", f"dtype={dtype}", "memory=smallest", *words)
            cells.append(f"{plan.prediction.process / 1e9:.1f}")
        billions = plan.shape.parameters / 1e9
        cells.insert(1, f"{said['full_finetuning_gb_per_billion'] * billions:.1f}")
        rule.append(cells)
    return f"{common.markdown(lines)}\n\n{common.markdown(rule)}"


def fit() -> str:
    """The constants of ``planning/measured.yaml`` from the records that it names, by least relative squares."""
    import numpy

    lines = []
    for task, folder in constants()["fitted_to"].items():
        found = [store.load(path.parent) for path in sorted((common.ROOT / folder).glob("*/record.json"))]
        records = [record for record in found if record.status == "ok" and record.task == task]
        predictions = [predict(record) for record in records]
        allocated, reserved, process = (
            numpy.array([record.readings[key].value for record in records]) for key in MEMORY
        )
        moving = numpy.array([prediction.moving / 1e9 for prediction in predictions])
        factors = numpy.stack([numpy.ones_like(moving), moving], axis=1) / allocated[:, None]
        constant, share = numpy.linalg.lstsq(factors, (reserved - allocated) / allocated, rcond=None)[0]
        context = (process - reserved).mean()
        lines.append(
            f"{task}: constant_gb {constant:.3f}, share {share:.4f}, context_gb {context:.3f}, n = {len(records)}"
        )
    return "\n".join(lines)


def cards() -> str:
    """The largest model of conf/model that trains on cards of five sizes, and the longest contexts, as Markdown."""
    titles = ["card", "memory (GB)", "largest model", "its process (GB)", "its longest context"]
    lines = [[*titles, *(f"longest context of {model}" for model in CONTEXTS)]]
    names = sorted(path.stem for path in (common.ROOT / "conf" / "model").glob("*.yaml") if path.stem != "custom")
    for card in ("rtx4060", "t4", "rtx4090", "a6000", "h100"):
        plans = {name: _plan(f"model={name}", "quant=nf4_nested", *planner_rows.SMALLEST, card=card) for name in names}
        fitting = [plan for plan in plans.values() if plan.fits]
        largest = max(fitting, key=lambda plan: plan.shape.parameters)
        cells = [card, f"{largest.target.memory:.2f}", largest.shape.name, f"{largest.prediction.process / 1e9:.2f}"]
        for plan in (largest, *(plans[name] for name in CONTEXTS)):
            cells.append(common.text(plan.figures["longest_context"], 0))
        lines.append(cells)
    return common.markdown(lines)


CONTEXTS = ("llama2_7b", "mistral_7b")
FULL = (("float32", "AdamW", []), ("bfloat16", "AdamW", []), ("bfloat16", "SGD", ["optimizer=sgd"]))


def _plan(*words: str, card: str = "h200") -> Any:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from llm_at_home.hardware.catalogue import load_catalogue
    from llm_at_home.planning.plan import Target, make

    with initialize_config_dir(str(common.ROOT / "conf"), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("plan", list(words)), resolve=True)
    return make(config, Target.of(load_catalogue()[card]), [])


def predict(record: Record) -> Any:
    """The planner's prediction for a record's configuration."""
    if record.task == "train":
        return predict_training(record.config)
    return predict_inference(record.config, record.config["questions"]["prompt_tokens"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="measure, and keep each row's record below this folder")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FOLDER", help="print the table of these records")
    parser.add_argument("--article", action="store_true", help="the company article's figures beside the planner's")
    parser.add_argument("--cards", action="store_true", help="the largest model and longest context of five cards")
    parser.add_argument("--fit", action="store_true", help="print the constants of planning/measured.yaml anew")
    parser.add_argument(
        "--bases",
        nargs="+",
        choices=planner_rows.ROWS,
        default=list(planner_rows.ROWS),
        metavar="BASE",
        help=", ".join(planner_rows.ROWS),
    )
    parser.add_argument("--minutes", type=float, default=60, help="start no row after so many (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny architecture: a try of the script itself")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of the process that does the work
    parser.add_argument("overrides", nargs="*", help="after --: overrides for every row, such as gpu=cpu")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return 0
    if args.fit:
        print(fit())
        return 0
    if args.cards:
        print(cards())
        return 0
    if args.article:
        print(article())
        return 0
    if not args.out:
        parser.error("give --out or --table")
    if args.until:
        planner_rows.work(args)
        return 0
    if not present_gpus() and "gpu=cpu" not in args.overrides:
        print("planner.py needs a CUDA GPU, and none is visible", file=sys.stderr)
        return 2
    return planner_rows.measure(args)


if __name__ == "__main__":
    sys.exit(main())
