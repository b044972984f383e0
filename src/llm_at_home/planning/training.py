"""The peak memory of a training run, by parts, from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_at_home.data.sources import SYNTHETIC
from llm_at_home.planning import adapters
from llm_at_home.planning.activations import (
    Batch,
    LayerMemory,
    LossMemory,
    layer_memory,
    loss_memory,
    with_inputs_of_int8,
)
from llm_at_home.planning.allocator import Gaps, context_bytes, cublas_workspace
from llm_at_home.planning.prediction import Moment, Prediction
from llm_at_home.planning.shape import Shape
from llm_at_home.planning.state import ADALORA_SCORES, OptimizerMemory, optimizer_memory
from llm_at_home.planning.weights import BYTES, model_bytes

# Whose activations were held against real runs; for others they are an estimate.
CHECKED_BASES = ("dense", "bitsandbytes")


def predict_training(config: Mapping[str, Any], capability: tuple[int, int] = (9, 0)) -> Prediction:
    """Predict the peaks of ``train.py`` on a GPU, from the second optimizer step on.

    Args:
        config: a resolved configuration of ``conf/train.yaml``; ``dtype`` is decided.
        capability: the card's compute capability.

    Raises:
        Refusal: for a model, adapter, quantization or optimizer that the planner does not know.
    """
    shape = Shape.of(config["model"])
    batch = batch_of(config)
    tensors = adapters.trained_tensors(shape, config["adapter"])
    trained = sum(size * count for size, count in tensors.items())
    full = adapters.kind(config["adapter"]) == "full"
    each = BYTES[config["dtype"]] if full else 4  # PEFT keeps adapters in float32, whatever the base is in
    optimizer = optimizer_memory(_optimizer(config), tensors, each)
    scores = ADALORA_SCORES * 4 * trained if adapters.kind(config["adapter"]) == adapters.ADALORA else 0
    static = {
        "weights": model_bytes(shape, config["quant"], config["dtype"]),
        "adapter": (0.0 if full else each * trained) + adapters.frozen_bytes(shape, config["adapter"]),
        "optimizer": optimizer.state + scores,
    }
    moments = _moments(config, shape, batch, static, float(each * trained), optimizer)
    workspace = cublas_workspace(capability, threads=2)
    peak = max(moments, key=lambda moment: moment.allocated)
    # What the allocator once took it keeps: the gaps are those of the moment with most that comes and goes.
    moving = max(moment.moving for moment in moments)
    gaps = Gaps.of("train").bytes(moving)
    parts = {**peak.parts, "workspace": peak.parts.get("workspace", 0.0) + workspace, "fragmentation": gaps}
    allocated = peak.allocated + workspace
    host = optimizer.host + (_boundaries(config, shape, batch) if _memory(config)["offload"] else 0.0)
    return Prediction(
        parts=parts,
        allocated=allocated,
        reserved=allocated + gaps,
        process=allocated + gaps + context_bytes("train"),
        moment=peak.name,
        moving=moving,
        host=host,
        trained=trained,
        notes=tuple(_notes(config, shape, batch)),
    )


def _optimizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer with ``trainer.fused`` handed on to it, as a run's settled configuration has it already."""
    trainer = config.get("trainer") or {}
    mixed16 = (trainer.get("precision") or ("16-mixed" if config["dtype"] == "float16" else "")) == "16-mixed"
    return {**config["optimizer"], **({"fused": True} if trainer.get("fused") and not mixed16 else {})}


def batch_of(config: Mapping[str, Any]) -> Batch:
    """The largest micro-batch that the data can give: every conversation as long as ``data.max_length``."""
    data = config["data"]
    size, length = data["batch_size"], data["max_length"]
    if data.get("packing"):
        return Batch(1, size * length, masked=size > 1)
    padded = size > 1 and data["source"] != SYNTHETIC and not config.get("trainer", {}).get("padded_lengths")
    return Batch(size, length, masked=padded)


def with_batch(config: Mapping[str, Any], size: int | None = None, length: int | None = None) -> dict[str, Any]:
    """The configuration with another micro-batch or length."""
    data = dict(config["data"])
    if size is not None:
        data["batch_size"] = size
    if length is not None:
        data["max_length"] = length
    return {**config, "data": data}


def _memory(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"checkpointing": "none", "offload": False, "loss_tokens": None, **config.get("memory", {})}


def recomputed_layers(config: Mapping[str, Any], shape: Shape) -> int:
    """How many decoder layers are computed again in the backward pass."""
    every = _memory(config)["checkpointing"]
    if every == "none":
        return 0
    return shape.layers if every == "full" else -(-shape.layers // int(every))


def _last_recomputed(config: Mapping[str, Any], shape: Shape) -> int:
    every = _memory(config)["checkpointing"]
    step = 1 if every == "full" else int(every)
    return (shape.layers - 1) // step * step


def _boundaries(config: Mapping[str, Any], shape: Shape, batch: Batch) -> float:
    return recomputed_layers(config, shape) * layer_memory(config, shape, batch).boundary


def _moments(
    config: Mapping[str, Any],
    shape: Shape,
    batch: Batch,
    static: Mapping[str, float],
    gradients: float,
    optimizer: OptimizerMemory,
) -> list[Moment]:
    """The moments that can be the peak: the loss (forth and back), a layer's backward pass, the optimizer's step.

    The module lets go of gradients when a step is over: those that wait are of micro-batches of the same step.
    """
    if gradients == 0:
        return [_without_training(config, shape, batch, static)]
    layer, loss = _with_virtual_tokens(config, shape, batch)
    recomputed = recomputed_layers(config, shape)
    offloaded = _memory(config)["offload"]
    boundaries = recomputed * (layer.held if offloaded else layer.boundary + layer.held)
    whole = (shape.layers - recomputed) * layer.kept
    accumulated = gradients if accumulation(config) > 1 or _is_graphed(config) else 0.0
    held = whole + boundaries + loss.kept
    found = [
        _moment("the loss, forward", static, accumulated, held, loss.forward),
        _moment("the loss, backward", static, accumulated, held, loss.logits),
        _working(_moment("a layer's backward pass", static, accumulated, whole + boundaries), layer.passing),
        _working(_moment("the optimizer's step", static, gradients, 0.0), optimizer.step),
    ]
    if recomputed:
        # The layers behind the last recomputed one have let go by then of what they kept.
        behind = shape.layers - 1 - _last_recomputed(config, shape)
        # What the layer in hand holds is part of what it keeps.
        there = (shape.layers - recomputed - behind + 1) * layer.kept + boundaries - layer.held
        found.append(_working(_moment("a recomputed layer", static, accumulated, there), layer.recomputing))
    return found


def _moment(
    name: str, static: Mapping[str, float], gradients: float, activations: float, logits: float = 0.0
) -> Moment:
    parts = {**static, "gradients": gradients, "activations": activations, "logits": logits}
    return Moment(name, parts, activations + logits)


def _working(moment: Moment, workspace: float) -> Moment:
    return replace(moment, parts={**moment.parts, "workspace": workspace}, moving=moment.moving + workspace)


def _with_virtual_tokens(config: Mapping[str, Any], shape: Shape, batch: Batch) -> tuple[LayerMemory, LossMemory]:
    """A layer's and the loss's memory; trained prompts make every row longer."""
    which = adapters.kind(config["adapter"])
    if which in (adapters.PROMPT, adapters.ENCODER):
        batch = replace(batch, tokens=batch.tokens + config["adapter"]["num_virtual_tokens"])
    layer = layer_memory(config, shape, batch)
    if config["quant"]["method"] == "bitsandbytes" and config["quant"]["bits"] == 8:
        layer = with_inputs_of_int8(layer, shape, batch, BYTES[config["dtype"]])
    if which == adapters.PREFIX:
        further = batch.rows * config["adapter"]["num_virtual_tokens"] * 2 * shape.values * BYTES[config["dtype"]]
        layer = replace(layer, kept=layer.kept + further)
    return layer, loss_memory(config, shape, batch)


def _without_training(config: Mapping[str, Any], shape: Shape, batch: Batch, static: Mapping[str, float]) -> Moment:
    """adapter=none: nothing is kept, and the logits are the peak."""
    loss = loss_memory(config, shape, batch)
    hidden = 2.0 * batch.all_tokens * shape.hidden * BYTES[config["dtype"]]
    cache = 2.0 * shape.layers * batch.all_tokens * shape.values * BYTES[config["dtype"]]
    return _moment("the loss, forward", static, 0.0, hidden + cache, loss.forward)


def accumulation(config: Mapping[str, Any]) -> int:
    """Micro-batches of an optimizer step; of a schedule the most."""
    steps = ((config.get("callbacks") or {}).get("accumulation") or {}).get("steps", 1)
    return max(int(count) for count in steps.values()) if isinstance(steps, Mapping) else int(steps)


def _is_graphed(config: Mapping[str, Any]) -> bool:
    """Whether a CUDA graph may hold the passes: the gradients that it adds to are its own, and stay."""
    return (config.get("trainer") or {}).get("graph", "off") != "off"


def _notes(config: Mapping[str, Any], shape: Shape, batch: Batch) -> list[str]:
    notes = []
    if config["quant"]["method"] not in CHECKED_BASES:
        notes.append(f"activations on quant={config['quant']['name']} were not held against a run")
    if shape.experts:
        notes.append("experts stay unquantized and without adapters; their activations are for an even routing")
    if batch.masked:
        notes.append("batches are taken to be padded or packed, which gives attention a mask")
    return notes
