"""What weights take once they are loaded, by quantization: bits per weight, scales and tables included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.planning.shape import Linear, Shape

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# llama.cpp's blocks: codes and scales of 32 (K types: 256) weights, in bits per weight.
GGUF_BITS = {"F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q5_1": 6.0, "Q5_0": 5.5, "Q4_1": 5.0, "Q4_0": 4.5}
NF4_BLOCK, NESTED_BLOCK = 64, 256  # weights that share a scale, and scales that share one (QLoRA, section 3)


def linear_bytes(linear: Linear, quant: Mapping[str, Any], dtype: str) -> float:
    """Bytes of one linear layer's matrix with its scales, without its bias.

    Args:
        linear: the layer.
        quant: the ``quant`` group.
        dtype: of what is not quantized, and of most scales.

    Raises:
        Refusal: for a format whose size follows from the weights themselves.
    """
    method, wide = quant["method"], BYTES[dtype]
    if method == "dense":
        return linear.weights * wide
    if method == "bitsandbytes" and quant["bits"] == 8:
        return linear.weights + 4 * linear.outputs
    if method == "bitsandbytes":
        blocks = linear.weights / NF4_BLOCK
        nested = quant["config"].get("bnb_4bit_use_double_quant")
        scales = blocks + 4 * (blocks / NESTED_BLOCK + 256) if nested else 4 * blocks
        return linear.weights / 2 + scales
    if method == "torchao" and quant["bits"] == 8:
        return linear.weights + wide * linear.outputs
    if method == "torchao":
        return linear.weights * (quant["bits"] / 8 + 2 * wide / quant["group_size"])
    if method == "rtn":
        sharing = {"tensor": linear.weights, "channel": linear.inputs, "group": quant["group_size"]}
        return linear.weights * (quant["bits"] / 8 + (wide + 1) / sharing[quant["granularity"]])
    if method == "gptqmodel":
        return linear.weights * _gptqmodel_bits(quant) / 8
    return linear.weights * gguf_bits(quant) / 8


def _gptqmodel_bits(quant: Mapping[str, Any]) -> float:
    """Codes with a 16-bit scale for each group, and a zero point of as many bits as a code where it is not symmetric.

    The kernels of a GPU drop the order of columns where it is the plain one, and symmetric zero points.

    Raises:
        Refusal: for a published checkpoint whose layers have different bits.
    """
    if quant.get("target_bits"):
        return float(quant["target_bits"])  # scales included, as the choice of bits counts them
    if quant["algorithm"] == "exl3":
        return float(quant["bits"])
    if quant["bits"] is None:
        what = f"the layers of this quant={quant['name']} checkpoint have bits of their own"
        raise Refusal(f"{what}, which the planner does not read: plan with quant=gptq quant.bits=N, N their average")
    return quant["bits"] + (16 + (0 if quant["sym"] else quant["bits"])) / quant["group_size"]


def gguf_bits(quant: Mapping[str, Any]) -> float:
    """Bits per weight of a type of llama.cpp's that gives every matrix the same.

    Raises:
        Refusal: for types that mix others by layer, and for files.
    """
    kind = quant.get("type")
    if kind not in GGUF_BITS:
        what = f"quant.type={kind} mixes types by layer" if kind else "a file's types are not known before it is read"
        raise Refusal(f"{what}: the planner knows quant.type={', '.join(GGUF_BITS)}")
    return GGUF_BITS[kind]


def model_bytes(shape: Shape, quant: Mapping[str, Any], dtype: str) -> float:
    """Bytes of the whole model: quantized linear layers, and everything else in ``dtype``.

    In a file of llama.cpp's the embeddings and the head are quantized too, at no fewer than eight bits here.
    """
    wide = BYTES[dtype]
    linears = shape.layers * sum(linear_bytes(linear, quant, dtype) for linear in shape.linears())
    if quant["method"] == "gguf":
        bits = gguf_bits(quant)
        return linears + shape.expert_weights * bits / 8 + shape.other_weights * max(bits, 8.5) / 8
    return linears + (shape.expert_weights + shape.other_weights) * wide


def bits_per_weight(shape: Shape, quant: Mapping[str, Any], dtype: str) -> float:
    """Bits that a weight of the decoder's linear layers takes, scales and tables included."""
    total = shape.layers * sum(linear_bytes(linear, quant, dtype) for linear in shape.linears())
    return 8 * total / shape.linear_weights
