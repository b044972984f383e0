"""What ``planner.py`` runs on a GPU: its rows by base, and how rows of one base share a process."""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import rows as common

from llm_at_home.errors import Refusal
from llm_at_home.hardware.emulation import cap_memory
from llm_at_home.records import store
from llm_at_home.records.schema import Record

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
INFER = ["model.weights=random", "questions=synthetic", "logger=none", "engine=eager", "engine.warmup_tokens=8"]
INFER += ["engine.temperature=0"]
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
    with common.bare(load(config)), tempfile.TemporaryDirectory(prefix="planner_") as folder:
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
        command = [sys.executable, sys.argv[0], "--out", str(args.out), "--until", str(until), "--bases", base]
        command += [*(["--tiny"] if args.tiny else []), "--", *args.overrides]
        before = None
        while missing(base, args.out) not in ([], before) and time.time() < until:
            before = missing(base, args.out)
            subprocess.run(command, env={**os.environ, **CHILD_ENVIRONMENT}, check=False)
    left = [name for base in args.bases for name in missing(base, args.out)]
    print(f"not there: {', '.join(left)}" if left else "all rows are there")
    return int(bool(left))
