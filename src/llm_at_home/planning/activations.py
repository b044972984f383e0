"""What a Llama-like decoder keeps for the backward pass, tensor by tensor, and what a pass needs for a moment.

Counted from transformers' modules as autograd runs them on a GPU: a tensor counts once however many functions keep it,
parameters and buffers do not. Tests hold the sums against the storages that are alive after a real forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llm_at_home.planning import adapters
from llm_at_home.planning.adapters import Kept
from llm_at_home.planning.shape import Shape
from llm_at_home.planning.weights import BYTES

# Log-probabilities, their gradient and that of the logits, all in float32, when the loss's backward pass begins.
LOSS_BACKWARD = 12
# What a layer's backward pass needs beside what it kept, in widths of the feed-forward block: the gradients of the
# product and of both its factors. A recomputed layer is at its peak earlier, with the product's alone, or where the
# adapter's layers copy their input in float32 (copied), at the end of its second forward pass. Read off real passes.
KEPT_WIDTHS = (3.0, 1.0)  # of the block's inner width, and of the stream's
RECOMPUTED_WIDTHS = {"shared": (1.0, 1.0), "copied": (5.0, 1.0), "float32": (1.0, 2.5)}


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        rows: sequences; of packed conversations one.
        tokens: of a row, padding included.
        masked: whether attention gets a mask: where rows are padded, or hold several conversations.
    """

    rows: int
    tokens: int
    masked: bool = False

    @property
    def all_tokens(self) -> int:
        """Of all rows."""
        return self.rows * self.tokens


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one decoder layer for a micro-batch.

    Attributes:
        kept: for the backward pass.
        boundary: its input, which is all that a recomputed layer keeps.
        passing: beside what is kept, while its backward pass runs.
        recomputing: the same for a layer that is recomputed.
        held: what of ``kept`` a recomputed layer keeps all the same, beside its input.
    """

    kept: float
    boundary: float
    passing: float
    recomputing: float
    held: float = 0.0


def layer_memory(config: Mapping[str, Any], shape: Shape, batch: Batch) -> LayerMemory:
    """What one decoder layer takes.

    Args:
        config: a resolved configuration of ``conf/train.yaml``.
        shape: of its model.
        batch: the micro-batch.
    """
    each = BYTES[config["dtype"]]
    added = adapters.kept(shape, config["adapter"], config["quant"], each)
    tokens = batch.all_tokens
    stream = 4 if added.wide else each
    kept = tokens * (_attention(shape, batch, each) + _block(shape, 4 if added.wide else each) + _norms(shape))
    kept += tokens * (added.token + _kept_inputs(shape, added, each)) + added.constant + _mask(batch, each)
    return LayerMemory(
        kept=kept,
        boundary=float(tokens * stream * shape.hidden),
        passing=_passing(config, shape, batch, each),
        recomputing=_passing(config, shape, batch, each, recomputed=True),
    )


def with_inputs_of_int8(layer: LayerMemory, shape: Shape, batch: Batch, each: int) -> LayerMemory:
    """A layer whose linear layers are LLM.int8()'s, on a GPU.

    bitsandbytes' function puts its input by where recomputing does not see it, and lets go of it in the backward pass
    alone; and each of the seven matrices has a copy of its own. Read off two runs on an H100 (int8_lora_b1_500 and
    int8_lora_b4_1024_full of results/h100/planner); on a CPU what reads the same tensor shares it.
    """
    inputs = sum(linear.inputs for linear in shape.linears())
    shared = 2 * shape.hidden + shape.queries + shape.inner  # counted already
    further = float(batch.all_tokens * each * (inputs - shared))
    return replace(layer, kept=layer.kept + further, held=float(batch.all_tokens * each * inputs))


def _norms(shape: Shape) -> float:
    """Both norms keep their input in float32 (of a 16-bit stream a copy) and a factor for each token."""
    heads = 2 * (4 * (shape.queries + shape.values) + 4) if shape.head_norms else 0
    return 2 * (4 * shape.hidden + 4) + heads


def _attention(shape: Shape, batch: Batch, each: int) -> float:
    """Queries, keys, values and the output, and a float32 log-sum of exponentials for each head.

    Under a mask keys and values are repeated for each query head.
    """
    values = shape.queries if batch.masked else shape.values
    return each * (2 * shape.queries + 2 * values) + 4 * shape.heads


def _mask(batch: Batch, each: int) -> float:
    """A boolean mask becomes one that is added, in the dtype of attention, anew in each layer, which keeps it."""
    aligned = -(-batch.tokens // 16) * 16
    return float(each * batch.rows * batch.tokens * aligned) if batch.masked else 0.0


def _block(shape: Shape, each: int) -> float:
    """The gate, its activation, and what it multiplies; of experts, for each that a token goes through."""
    if not shape.experts:
        return 3.0 * each * shape.inner
    # The gathered inputs' products, each expert's output before its weight, and the routers' probabilities.
    routed = shape.experts_per_token * each * (3 * shape.inner + 2 * shape.hidden)
    return routed + 4.0 * 2 * shape.experts


def _kept_inputs(shape: Shape, added: Kept, each: int) -> float:
    widths = {"attention": shape.hidden, "block": shape.hidden, "product": shape.inner}
    return float(each * sum(widths[name] for name in added.inputs))


def _copying(config: Mapping[str, Any], each: int) -> str:
    if each == 4:
        return "float32"
    dense = config["quant"]["method"] in ("dense", "torchao")
    return "copied" if dense and adapters.kind(config["adapter"]) in (adapters.LORA, adapters.ADALORA) else "shared"


def _passing(config: Mapping[str, Any], shape: Shape, batch: Batch, each: int, recomputed: bool = False) -> float:
    widths = RECOMPUTED_WIDTHS[_copying(config, each)] if recomputed else KEPT_WIDTHS
    values = batch.all_tokens * (widths[0] * shape.inner * shape.experts_per_token + widths[1] * shape.hidden)
    widest = max((linear.weights for linear in shape.linears()), default=0)
    passing = each * values
    if config["quant"]["method"] != "dense":
        passing += each * widest  # a matrix read back
    which = adapters.kind(config["adapter"])
    targets = adapters.targets(shape, config["adapter"])
    if which == adapters.LOHA:
        # While one matrix's update goes backward none is read back, and fewer gradients of the block's are there.
        stream = each * batch.all_tokens * (shape.hidden + (0 if recomputed else shape.inner))
        own = max(adapters.loha_passing(linear, config["adapter"], each) for linear in targets)
        passing = max(passing, own + stream)
    if config["adapter"].get("use_dora"):
        # A unit matrix as wide as the widest input goes through both factors, to give the update as a matrix.
        passing += 8.0 * max(linear.inputs for linear in targets) ** 2
    return float(passing)


@dataclass(frozen=True)
class LossMemory:
    """Bytes of what comes after the layers.

    Attributes:
        kept: the last norm's input and what the loss looks at of it.
        logits: when most of logits, probabilities and their gradients are there.
        forward: the same while the loss is computed.
    """

    kept: float
    logits: float
    forward: float


def loss_memory(config: Mapping[str, Any], shape: Shape, batch: Batch) -> LossMemory:
    """What logits and loss take, with all logits at once, ``memory.loss_tokens`` at a time, or in Liger's kernel."""
    each = BYTES[config["dtype"]]
    memory = config.get("memory", {})
    part, liger = memory.get("loss_tokens"), memory.get("loss") == "liger"
    full = adapters.kind(config["adapter"]) == "full"
    hidden = float(batch.all_tokens * each * shape.hidden)
    kept = batch.all_tokens * (4.0 * shape.hidden + 4 + 2 * each * shape.queries / shape.heads)
    kept += (hidden if part else 0.0) + (2 * hidden if full else 0.0)
    if liger:
        return _in_liger(shape, batch, each, kept, hidden, full)
    held = min(part, batch.all_tokens) if part else batch.all_tokens
    forward = held * shape.vocabulary * (8 if each == 4 else 4 + 4 + each)
    return LossMemory(kept, float(held * shape.vocabulary * LOSS_BACKWARD), float(forward))


def _in_liger(shape: Shape, batch: Batch, each: int, kept: float, hidden: float, full: bool) -> LossMemory:
    """Liger's fused kernel, counted from its source (0.8.5, ``fused_linear_cross_entropy_forward``).

    It makes the gradient of the hidden states in the forward pass, which is all that waits for the backward pass, and
    holds logits of so many tokens that they take no more than the hidden states, in a power of two. Where the output
    layer trains, its gradient is summed in float32.
    """
    share = -(-batch.all_tokens // -(-shape.vocabulary // shape.hidden))
    held = min(1 << (share - 1).bit_length(), batch.all_tokens)
    head = float(shape.vocabulary * shape.hidden) if full else 0.0
    summed = head * 4 if each == 2 else 0.0
    return LossMemory(kept + hidden + each * head, hidden, hidden + summed + held * shape.vocabulary * each)
