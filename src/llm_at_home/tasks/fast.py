"""What the keys of ``trainer=fast`` that are not Lightning's mean: compiled layers, graphs, few shapes, fused steps."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.training.regional import LAYERS, OFF

# Of the trainer group; the rest is Lightning's.
OWN_KEYS = ("compile", "graph", "padded_lengths", "fused")
AUTO = "auto"
FREES_RECOMPUTED = (2, 12)  # the first torch that does, of compiled layers on bitsandbytes' weights
FUSED = ("torch.optim.AdamW", "torch.optim.SGD")


def settle(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with ``trainer.fused`` handed on to the optimizer, where that has such a kernel.

    A fused optimizer takes an fp16 scaler's factor back inside its step, after the gradients were clipped: with
    ``16-mixed`` it stays the usual one.

    Raises:
        Refusal: where ``trainer.fused`` is no switch.
    """
    trainer = dict(config["trainer"])
    for key in ("compile", "graph"):
        if trainer.get(key) in (None, False):  # YAML reads off so
            trainer[key] = OFF
    takes = config["optimizer"]["_target_"] in FUSED and trainer["precision"] != "16-mixed"
    optimizer = config["optimizer"]
    fused = trainer.pop("fused", False)
    if not isinstance(fused, bool):
        raise Refusal(f"trainer.fused={fused} is no switch: give true or false")
    if fused and takes:
        optimizer = {**optimizer, "fused": True}
    return {**config, "trainer": trainer, "optimizer": optimizer}


def lightning_options(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The ``trainer`` group without the keys that are not Lightning's."""
    return {key: value for key, value in trainer.items() if key not in OWN_KEYS}


def shapes(config: Mapping[str, Any]) -> Any:
    """The shapes that batches are rounded up to, or None for each batch its own."""
    from llm_at_home.training.shapes import Shapes

    lengths = config["trainer"].get("padded_lengths")
    if not lengths:
        return None
    rows, length = config["data"]["batch_size"], config["data"]["max_length"]
    return Shapes(rows, rows * length if config["data"]["packing"] else length, lengths)


def is_compiled(config: Mapping[str, Any]) -> bool:
    """Whether the run compiles its decoder layers."""
    wanted = config["trainer"].get("compile")
    return bool(wanted == LAYERS or (wanted == AUTO and compile_obstacle(config) is None))


def compile_obstacle(config: Mapping[str, Any]) -> str | None:
    """Why ``trainer.compile=auto`` leaves the layers as they are, or None where it compiles them.

    On bitsandbytes' weights, torch 2.11 keeps activations of a compiled layer past activation checkpointing; 2.12 does
    not (``benchmarks/compiled_memory.py``).
    """
    recomputed = config["memory"]["checkpointing"] != "none"
    if not recomputed or config["quant"]["method"] != "bitsandbytes" or _torch() >= FREES_RECOMPUTED:
        return None
    return "before torch 2.12 those on bitsandbytes' weights keep what recomputing should free"


def _torch() -> tuple[int, int]:
    major, minor = importlib.metadata.version("torch").split(".")[:2]
    return int(major), int(minor)


def graph_obstacle(config: Mapping[str, Any]) -> str | None:
    """Why a run's passes cannot be captured as a CUDA graph, or None where they can.

    Recomputed layers can, unless something draws random numbers, which the model is asked for
    (:func:`llm_at_home.training.probes.draws_numbers`).
    """
    trainer, memory = config["trainer"], config["memory"]
    obstacles = {
        "there is no GPU": config["gpu"]["device"] != "cuda",
        "nothing is trained": config["adapter"]["trains"] == "nothing",
        "each batch has a length of its own": not trainer.get("padded_lengths"),
        "packed conversations need a mask that is made on the host": config["data"]["packing"],
        "what is offloaded goes through the host": memory["offload"],
        "Liger's loss counts its tokens on the host": memory["loss"] == "liger",
        "several processes share gradients": trainer["devices"] > 1,
    }
    return next((why for why, holds in obstacles.items() if holds), None)
