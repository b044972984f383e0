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
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rows as common

from llm_at_home.errors import Refusal
from llm_at_home.hardware.emulation import cap_memory
from llm_at_home.hardware.present import present_gpus
from llm_at_home.planning.allocator import constants
from llm_at_home.planning.inference import predict_inference
from llm_at_home.planning.training import predict_training
from llm_at_home.records import store
from llm_at_home.records.schema import Record
from llm_at_home.reporting import published

# Two micro-batches a step, so that gradients wait for the second; the second step has the optimizer's state.
TRAIN = [
    "model.weights=random",
    "data=synthetic",
    "logger=none",
    "trainer.max_steps=2",
    "callbacks.power.idle_seconds=0",
]
TRAIN += [
    "callbacks.accumulation.steps=2",
    "callbacks.checkpoints.every_n_steps=1000",
    "callbacks.throughput.warmup_steps=1",
]
INFER = ["model.weights=random", "questions=synthetic", "logger=none", "engine.warmup_tokens=8", "engine.temperature=0"]
BASES = {
    "none": ["quant=none", "dtype=bfloat16"],
    "nested": ["quant=nf4_nested", "dtype=bfloat16"],
    "int8": ["quant=int8", "dtype=bfloat16"],
    "mistral": ["model=mistral_7b", "quant=nf4_nested", "dtype=bfloat16"],
    "llama3": ["model=llama3_8b", "quant=nf4", "dtype=bfloat16"],
    "nf4": ["quant=nf4", "dtype=bfloat16"],
    "70b": ["model=llama3_70b", "quant=nf4_nested", "dtype=bfloat16"],
    "13b": ["model=llama2_13b", "quant=nf4_nested", "dtype=bfloat16"],
}
SMALLEST = ["memory=smallest", "optimizer=paged_adamw_8bit", "adapter.r=8"]


def _train(batch: int, length: int, *words: str) -> list[str]:
    return [f"data.batch_size={batch}", f"data.max_length={length}", *words]


def _infer(batch: int, prompt: int, new: int) -> list[str]:
    return ["infer", f"engine.batch_size={batch}", f"questions.prompt_tokens={prompt}", f"engine.max_new_tokens={new}"]


# By base, the most telling first. A row is named after what is varied.
ROWS: dict[str, dict[str, list[str]]] = {
    "none": {
        "none_lora_b4_512": _train(4, 512),
        "none_infer_b4_1000": _infer(4, 1000, 32),
        "none_lora_b2_2048_full": _train(2, 2048, "memory.checkpointing=full"),
        "none_lokr_b1_1000_sgd": _train(1, 1000, "adapter=lokr", "optimizer=sgd"),
        "none_lora_dropout_b1_1000": _train(1, 1000, "adapter.lora_dropout=0.05"),
        "none_infer_b16_500": _infer(16, 500, 32),
        # Last, since it changes the weights.
        "none_full_b1_500_smallest": _train(1, 500, "adapter=full", "memory=smallest"),
    },
    "nested": {
        "nested_smallest_400": _train(1, 400, *SMALLEST),
        "nested_smallest_r64_400": _train(1, 400, "memory=smallest", "optimizer=paged_adamw_8bit"),
        "nested_smallest_sgd_2048": _train(1, 2048, *SMALLEST, "optimizer=sgd"),
        "nested_lora_b2_512_8bit": _train(2, 512, "optimizer=adamw_8bit"),
        "limit_8gb_llama2_7b_4096": _train(1, 4096, *SMALLEST, "gpu=rtx4060"),
    },
    "int8": {
        "int8_lora_b1_500": _train(1, 500),
        "int8_lora_b4_1024_full": _train(4, 1024, "memory.checkpointing=full"),
    },
    "mistral": {
        "mistral_lora_b2_1024": _train(2, 1024),
        "mistral_infer_b16_1000": _infer(16, 1000, 32),
        "limit_8gb_mistral_7b_5200": _train(1, 5200, *SMALLEST, "gpu=rtx4060"),
        "limit_24gb_mistral_7b_32000": _train(1, 32000, *SMALLEST, "gpu=rtx4090"),
    },
    "llama3": {"llama3_lora_b1_2048": _train(1, 2048)},
    "nf4": {
        "nf4_lora_b1_400": _train(1, 400),  # measured in a process of its own in results/h100/table3
        "nf4_lora_b4_500": _train(4, 500),
        "nf4_lora_b1_2048": _train(1, 2048),
        "nf4_lora_b8_256": _train(8, 256),
        "nf4_lora_b2_1024_full": _train(2, 1024, "memory.checkpointing=full"),
        "nf4_lora_b4_1000_every2": _train(4, 1000, "memory.checkpointing=2"),
        "nf4_lora_b8_1000_smallest_8bit": _train(8, 1000, "memory=smallest", "optimizer=adamw_8bit"),
        "nf4_lora_b4_2048_smallest_paged": _train(4, 2048, "memory=smallest", "optimizer=paged_adamw_8bit"),
        "nf4_lora_b2_1000_sgd_loss256": _train(2, 1000, "optimizer=sgd", "memory.loss_tokens=256"),
        "nf4_adalora_b2_500": _train(2, 500, "adapter=adalora", "trainer.max_steps=5"),
        "nf4_lokr_b4_500": _train(4, 500, "adapter=lokr"),
        "nf4_infer_b8_1000": _infer(8, 1000, 32),
        "nf4_bottleneck_b2_1000": _train(2, 1000, "adapter=bottleneck", "optimizer=sgd"),
        "nf4_vera_b1_500": _train(1, 500, "adapter=vera"),
        "nf4_loha_b1_500": _train(1, 500, "adapter=loha", "adapter.r=8"),
        "nf4_infer_b1_2000": _infer(1, 2000, 32),
    },
    "70b": {"limit_48gb_llama3_70b_4096": _train(1, 4096, *SMALLEST, "gpu=a6000")},
    "13b": {
        "13b_lora_b2_500": _train(2, 500),
        # A T4's memory around a chip with bfloat16.
        "limit_16gb_llama2_13b_4096": _train(1, 4096, *SMALLEST, "gpu=t4", "gpu.compute_capability='8.0'"),
    },
}
TINY = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 4}
TINY_LENGTHS = {
    "train": ["data.max_length=24"],
    "infer": ["questions.prompt_tokens=16", "engine.max_new_tokens=4", "engine.warmup_tokens=2"],
}
MEMORY = ("torch_allocated_peak", "torch_reserved_peak", "process_memory_peak")
LEFT_GB = 0.01  # what a row may leave behind
HEADLINE = ("torch_reserved_peak", "process_memory_peak", "steps_per_second")


def work(args: argparse.Namespace) -> None:
    """Rows of one base, which is loaded once, until one leaves something on the card or the time is up."""
    import torch

    from llm_at_home.quantization import base as loader
    from llm_at_home.training.callbacks import checkpoints
    from llm_at_home.training.module import CausalLMModule

    load = loader.load_base
    kept: list[Any] = []

    def load_once(config: Any) -> Any:
        if not kept:
            kept.append(load(config))
        return kept[0]

    loader.load_base = load_once  # type: ignore[assignment]
    # Writing hundreds of megabytes of adapter is no part of what is measured.
    checkpoints.save_weights = lambda model, folder: folder  # type: ignore[assignment]
    # Lightning moves a module to the host when it is done with it: the next row would start there.
    CausalLMModule.cpu = lambda self: self  # type: ignore[method-assign]
    (base,) = args.bases
    for name in missing(base, args.out):
        if time.time() > args.until:
            print(f"the time is up before {name}: the same command goes on with it")
            return
        start = time.monotonic()
        try:
            record = one([*BASES[base], *ROWS[base][name]], args, load_once)
        except Refusal as refusal:
            print(f"{name}: refused: {refusal}", flush=True)
            continue
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_per_process_memory_fraction(1.0)
        store.save(record, args.out / name)
        _say(name, record, time.monotonic() - start)
        before, after = record.provenance["base_alone"], _empty(record.config)
        if before and after and after["allocated_gb"] > before["allocated_gb"] + LEFT_GB:
            return


def missing(base: str, out: Path) -> list[str]:
    """Rows of a base that have no result yet."""
    return [name for name in ROWS[base] if common.status(out / name) not in common.DONE]


def one(words: list[str], args: argparse.Namespace, load: Any) -> Record:
    """One row as the product runs it, on the base that is there."""
    from hydra import compose, initialize_config_dir

    from llm_at_home.records import hashing, provenance
    from llm_at_home.tasks import resolve

    task = "infer" if "infer" in words else "train"
    words = [*(INFER if task == "infer" else TRAIN), *_model(words, args), *(w for w in words if w != "infer")]
    if args.tiny:
        words += TINY_LENGTHS[task]
    words += args.overrides
    with initialize_config_dir(str(common.ROOT / "conf"), version_base="1.3"):
        config = resolve.resolve(task, compose(task, words), words)
    if task == "train":
        config["limit"] = config["data"]["batch_size"] * 2 * config["trainer"]["max_steps"]
    else:
        config["limit"] = config["engine"]["batch_size"]
    resolve.check(task, config)
    digest = hashing.config_hash(config, resolve.ingredients(task, config))
    record = Record(task=task, config=config, config_hash=digest, provenance=provenance.collect())
    _empty(config)
    emulation = cap_memory(config["gpu"]) if config["gpu"]["device"] == "cuda" else None
    if emulation:
        record.provenance["emulation"] = emulation
    with restored(load(config)), tempfile.TemporaryDirectory(prefix="planner_") as folder:
        record.provenance["base_alone"] = _empty(config)
        try:
            resolve.task_module(task).run(config, Path(folder), record, None)
        except Exception as error:
            record.status = "out_of_memory" if "out of memory" in str(error).lower() else "failed"
            record.error = {"type": type(error).__name__, "message": str(error).splitlines()[0]}
    return record


def _model(words: list[str], args: argparse.Namespace) -> list[str]:
    named = [] if any(word.startswith("model=") for word in words) else ["model=llama2_7b"]
    return [*named, *(f"model.architecture.{key}={value}" for key, value in TINY.items())] if args.tiny else named


@contextmanager
def restored(model: Any) -> Iterator[None]:
    """Whatever a row puts on the base is taken off again, and its layers keep everything for the backward pass."""
    before = {name: module for name, module in model.named_modules() if name}
    try:
        yield
    finally:
        for name, module in before.items():
            parent, _, last = name.rpartition(".")
            setattr(before[parent] if parent else model, last, module)
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
        if hasattr(model, "peft_config"):
            del model.peft_config
        model.requires_grad_(False).eval()
        for parameter in model.parameters():
            parameter.grad = None


def _empty(config: dict[str, Any]) -> dict[str, float] | None:
    """Give back what no tensor uses; what is left, in GB, tells whether the row before left anything."""
    gc.collect()
    if config["gpu"]["device"] != "cuda":
        return None
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return {"allocated_gb": torch.cuda.memory_allocated() / 1e9, "reserved_gb": torch.cuda.memory_reserved() / 1e9}


def _say(name: str, record: Record, seconds: float) -> None:
    shown = ", ".join(
        f"{common.text(record.readings[key], 3)} {record.readings[key].unit}"
        for key in HEADLINE
        if common.has(record, key)
    )
    print(f"{name}: {record.status} in {seconds:.0f} s  {shown}  {(record.error or {}).get('message', '')}", flush=True)


def measure(args: argparse.Namespace) -> int:
    """All rows, in processes that have the allocator as jobs have it; 1 when some are not there."""
    from llm_at_home.tasks.launch import CHILD_ENVIRONMENT

    until = time.time() + args.minutes * 60
    for base in args.bases:
        command = [sys.executable, __file__, "--out", str(args.out), "--until", str(until), "--bases", base]
        command += [*(["--tiny"] if args.tiny else []), "--", *args.overrides]
        before = None
        while missing(base, args.out) not in ([], before) and time.time() < until:
            before = missing(base, args.out)
            subprocess.run(command, env={**os.environ, **CHILD_ENVIRONMENT}, check=False)
    left = [name for base in args.bases for name in missing(base, args.out)]
    print(f"not there: {', '.join(left)}" if left else "all rows are there")
    return int(bool(left))


def table(folders: list[Path]) -> str:
    """Predicted and measured peaks of the records below these folders, as Markdown."""
    titles = ["row"]
    for key in MEMORY:
        titles += [f"{key.replace('_', ' ')} (GB)", "predicted", "error (%)"]
    lines = [[*titles, "peak at"]]
    worst: dict[str, list[float]] = {key: [] for key in MEMORY}
    for path in [path for folder in folders for path in sorted(folder.glob("*/record.json"))]:
        record = store.load(path.parent)
        if record.status != "ok":
            lines.append([f"{path.parent.name} ({record.status})", *[common.DASH] * (3 * len(MEMORY) + 1)])
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
        lines.append([path.parent.name, *cells, prediction.moment])
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
        plans = {name: _plan(f"model={name}", "quant=nf4_nested", *SMALLEST, card=card) for name in names}
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
    parser.add_argument("--bases", nargs="+", choices=ROWS, default=list(ROWS), metavar="BASE", help=", ".join(ROWS))
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
        work(args)
        return 0
    if not present_gpus() and "gpu=cpu" not in args.overrides:
        print("planner.py needs a CUDA GPU, and none is visible", file=sys.stderr)
        return 2
    return measure(args)


if __name__ == "__main__":
    sys.exit(main())
