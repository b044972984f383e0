"""What an adapter adds: the parameters it trains, and what its layers keep for the backward pass.

The shapes are PEFT's (0.21) and this project's own; tests hold the counts against PEFT's own on real models.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.planning.shape import Linear, Shape

ATTENTION_INPUT = ("q_proj", "k_proj", "v_proj")
BLOCK_INPUT = ("gate_proj", "up_proj")
LORA, ADALORA, LOKR, LOHA = "LoraConfig", "AdaLoraConfig", "LoKrConfig", "LoHaConfig"
OFT, VERA, BOTTLENECK, IA3 = "OFTConfig", "VeraConfig", "BottleneckConfig", "IA3Config"
PROMPT, PREFIX, ENCODER, NORMS = "PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig", "LNTuningConfig"
KINDS = (LORA, ADALORA, LOKR, LOHA, OFT, VERA, BOTTLENECK, IA3, PROMPT, PREFIX, ENCODER, NORMS)
# OFT's blocks and what their Cayley-Neumann series keeps of them.
OFT_KEPT = 7


def kind(adapter: Mapping[str, Any]) -> str:
    """The class of PEFT's configuration, ``full`` or ``none``.

    Raises:
        Refusal: for one whose memory the planner does not know.
    """
    if adapter["trains"] in ("all", "nothing"):
        return {"all": "full", "nothing": "none"}[adapter["trains"]]
    found = str(adapter["_target_"]).rpartition(".")[2]
    if found not in KINDS:
        raise Refusal(f"adapter={adapter['name']} ({found}) is unknown to the planner: use one of conf/adapter")
    return found


def targets(shape: Shape, adapter: Mapping[str, Any]) -> list[Linear]:
    """The linear layers of a decoder layer that the adapter stands on."""
    named = adapter.get("target_modules") or ()
    return [linear for linear in shape.linears() if named == "all-linear" or linear.name in named]


def trained_tensors(shape: Shape, adapter: Mapping[str, Any]) -> Counter[int]:
    """The tensors that train, as how many there are of each number of parameters."""
    which = kind(adapter)
    found: Counter[int] = Counter()
    if which == "none":
        return found
    if which == "full":
        return _everything(shape)
    if which in (PROMPT, ENCODER, PREFIX):
        return _prompt(shape, adapter, which)
    if which == NORMS:
        named = adapter["target_modules"]
        per_layer = sum(name in named for name in ("input_layernorm", "post_attention_layernorm"))
        found[shape.hidden] = per_layer * shape.layers + ("norm" in named)
        return found
    for linear in targets(shape, adapter):
        for size in _of_linear(linear, adapter, which):
            found[size] += shape.layers
    return found


def trained_parameters(shape: Shape, adapter: Mapping[str, Any]) -> int:
    """How many parameters take gradients."""
    return sum(size * count for size, count in trained_tensors(shape, adapter).items())


def frozen_bytes(shape: Shape, adapter: Mapping[str, Any]) -> float:
    """Bytes of what the adapter holds and does not train: VeRA's shared random projections, in float32."""
    if kind(adapter) != VERA:
        return 0.0
    layers = targets(shape, adapter)
    widest = max(linear.inputs for linear in layers) + max(linear.outputs for linear in layers)
    return 4.0 * adapter["r"] * widest


def _everything(shape: Shape) -> Counter[int]:
    found: Counter[int] = Counter()
    found[shape.vocabulary * shape.hidden] = 1 if shape.tied else 2
    found[shape.hidden] = 2 * shape.layers + 1
    for linear in shape.linears():
        found[linear.weights] += shape.layers
        if linear.bias:
            found[linear.outputs] += shape.layers
    if shape.head_norms:
        found[shape.head_norms // 2] += 2 * shape.layers
    if shape.experts:
        found[shape.experts * 2 * shape.hidden * shape.inner] += shape.layers
        found[shape.experts * shape.hidden * shape.inner] += shape.layers
        found[shape.experts * shape.hidden] += shape.layers
    return found


def _prompt(shape: Shape, adapter: Mapping[str, Any], which: str) -> Counter[int]:
    tokens = adapter["num_virtual_tokens"]
    if which == PREFIX:
        return Counter({tokens * 2 * shape.layers * shape.values: 1})
    found = Counter({tokens * shape.hidden: 1})
    if which == ENCODER:
        inner = adapter["encoder_hidden_size"]
        for size in (shape.hidden * inner, inner, inner * inner, inner, inner * shape.hidden, shape.hidden):
            found[size] += 1
    return found


def _of_linear(linear: Linear, adapter: Mapping[str, Any], which: str) -> list[int]:
    rank, inputs, outputs = adapter.get("r", 0), linear.inputs, linear.outputs
    if which == LORA:
        return [rank * inputs, rank * outputs] + ([outputs] if adapter.get("use_dora") else [])
    if which == ADALORA:
        start = adapter["init_r"]
        return [start * inputs, start * outputs, start]
    if which == LOHA:
        return [rank * outputs, rank * inputs] * 2
    if which == LOKR:
        return LoKr.of(linear, adapter).sizes()
    if which == OFT:
        block = adapter["oft_block_size"]
        return [inputs // block * (block * (block - 1) // 2)]
    if which == VERA:
        return [rank, outputs]
    if which == BOTTLENECK:
        width = adapter["bottleneck_size"]
        return [outputs * width, width, width * outputs, outputs]
    return [inputs if linear.name in adapter["feedforward_modules"] else outputs]  # IA3


@dataclass(frozen=True)
class LoKr:
    """LoKr's factors on one layer: A of shape (out_a, in_a), B of shape (out_b, in_b), whole or of a rank."""

    out_a: int
    in_a: int
    out_b: int
    in_b: int
    rank: int
    whole_a: bool
    whole_b: bool

    @classmethod
    def of(cls, linear: Linear, adapter: Mapping[str, Any]) -> LoKr:
        """The shapes that PEFT gives the factors."""
        factor, rank = adapter["decompose_factor"], adapter["r"]
        in_a, in_b = _factors(linear.inputs, factor)
        out_a, out_b = _factors(linear.outputs, factor)
        whole_a = not (adapter.get("decompose_both") and rank < max(out_a, in_a) / 2)
        return cls(out_a, in_a, out_b, in_b, rank, whole_a, not rank < max(out_b, in_b) / 2)

    def sizes(self) -> list[int]:
        """Parameters of each tensor."""
        first = [self.out_a * self.in_a] if self.whole_a else [self.out_a * self.rank, self.rank * self.in_a]
        second = [self.out_b * self.in_b] if self.whole_b else [self.out_b * self.rank, self.rank * self.in_b]
        return first + second

    def kept_values(self) -> tuple[int, bool]:
        """Values a token that this project's layer keeps beside its input, and whether it keeps its input.

        The product with A, a small matrix, keeps a copy of its operand; see adapters/lokr.py for the order of products.
        """
        if not self.whole_b:
            return self.in_a * self.rank + self.out_a * self.rank, True
        if self.out_a * self.in_b <= self.in_a * self.out_b:
            return self.in_a * self.in_b + self.out_a * self.in_b, False
        return self.in_a * self.out_b, True


def loha_passing(linear: Linear, adapter: Mapping[str, Any], bytes_each: int) -> float:
    """Bytes that the backward pass of LoHa on one layer needs for a moment, read off real passes.

    Args:
        linear: the layer.
        adapter: the ``adapter`` group.
        bytes_each: of a value: 2 under autocast to 16 bits, 4 in float32.
    """
    rank, widths = adapter["r"], linear.inputs + linear.outputs
    if adapter.get("implementation") == "peft":
        # Its function computes the gradients outside autocast, in float32 whatever the update was in.
        return float((12 + bytes_each) * linear.weights + 4 * rank * widths)
    if rank**2 * widths < linear.weights:
        # adapters/loha.py keeps the factors apart: of the wider factor's r^2 columns the gradient in float32, both
        # that come of it, and what the pass computed again in 16 bits.
        return 14.0 * rank**2 * max(linear.inputs, linear.outputs)
    gradients = 4 * rank * widths if bytes_each == 2 else 0  # in float32, beside those in 16 bits
    return float(5 * bytes_each * linear.weights + gradients)


def _factors(size: int, factor: int) -> tuple[int, int]:
    """The divisors nearest to each other, the smaller of which is at most ``factor`` (any, for -1)."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    small = max(divisor for divisor in range(1, most + 1) if size % divisor == 0)
    return small, size // small


@dataclass(frozen=True)
class Kept:
    """What one decoder layer keeps for the backward pass because of its adapter.

    Attributes:
        token: bytes a token.
        constant: bytes however many tokens: parameters cast to 16 bits under autocast, and what is made of them.
        inputs: the inputs of linear layers that are kept, each once: ``attention``, ``block`` and ``product`` (what
            q_proj, gate_proj and down_proj get); o_proj's is attention's output, which is kept anyway.
        wide: the residual stream is float32 from the first layer on: the adapter's result is, and nothing casts it.
    """

    token: float
    constant: float = 0.0
    inputs: frozenset[str] = frozenset()
    wide: bool = False


def kept(shape: Shape, adapter: Mapping[str, Any], quant: Mapping[str, Any], bytes_each: int) -> Kept:
    """What the adapter makes a decoder layer keep.

    Args:
        shape: of the model.
        adapter: the ``adapter`` group.
        quant: the ``quant`` group: PEFT's layers for dense bases copy their input, those for quantized ones do not.
        bytes_each: of a value: 2 under autocast to 16 bits, 4 in float32.
    """
    which = kind(adapter)
    layers = targets(shape, adapter)
    casts = 2.0 * sum(sum(_of_linear(linear, adapter, which)) for linear in layers) if bytes_each == 2 else 0.0
    if which == "full":
        return Kept(2.0 * bytes_each * shape.hidden, inputs=frozenset({"attention", "block", "product"}))
    if which == NORMS:
        return Kept(2.0 * bytes_each * shape.hidden)
    if which in (LORA, ADALORA):
        return _lora(shape, adapter, quant, bytes_each, casts)
    shared = _inputs(layers)
    if which == LOKR:
        factored = [LoKr.of(linear, adapter) for linear in layers]
        own = [one.kept_values() for one in factored]
        whole = [linear for linear, (_, keeps) in zip(layers, own, strict=True) if keeps]
        token = float(bytes_each * sum(values for values, _ in own))
        if adapter.get("implementation") == "peft":
            # The whole update is made, and kept with its second factor and the input.
            seconds = sum(one.out_b * one.in_b for one in factored)
            whole_update = bytes_each * (sum(linear.weights for linear in layers) + seconds)
            return Kept(0.0, casts + whole_update, shared)
        return Kept(token, casts, _inputs(whole))
    if which == LOHA:
        # PEFT makes the whole update in the forward pass, and keeps it.
        made = sum(linear.weights for linear in layers) if adapter.get("implementation") == "peft" else 0
        return Kept(0.0, float(bytes_each * made), shared)
    if which == OFT:
        block = adapter["oft_block_size"]
        inputs = sum(linear.inputs for linear in layers)
        return Kept(float(bytes_each * inputs), float(bytes_each * OFT_KEPT * inputs * block))
    if which == VERA:
        rank = adapter["r"]
        outputs = sum(linear.outputs for linear in layers)
        copies = 2.0 * rank * sum(linear.inputs + linear.outputs for linear in layers) if bytes_each == 2 else 0.0
        return Kept(float(bytes_each * (len(layers) * rank + outputs)), copies)
    if which == BOTTLENECK:
        values = sum(linear.outputs + 2 * adapter["bottleneck_size"] for linear in layers)
        return Kept(float(bytes_each * values), casts)
    if which == IA3:
        return _ia3(layers, adapter, quant, bytes_each)
    return Kept(0.0)


def _inputs(layers: list[Linear]) -> frozenset[str]:
    """The inputs that these layers keep, each once."""
    names = {linear.name for linear in layers}
    found = {"attention"} if names & set(ATTENTION_INPUT) else set()
    found |= {"block"} if names & set(BLOCK_INPUT) else set()
    return frozenset(found | ({"product"} if "down_proj" in names else set()))


def _lora(shape: Shape, adapter: Mapping[str, Any], quant: Mapping[str, Any], bytes_each: int, casts: float) -> Kept:
    layers = targets(shape, adapter)
    rank = adapter["init_r"] if kind(adapter) == ADALORA else adapter["r"]
    inputs, outputs = (sum(getattr(linear, side) for linear in layers) for side in ("inputs", "outputs"))
    token = float(bytes_each * rank * len(layers))
    # PEFT's layer for plain linear layers casts its input to float32, which autocast casts back: a copy for each.
    copies = bytes_each == 2 and quant["method"] in ("dense", "torchao")
    four_bit = quant["method"] == "bitsandbytes" and quant["bits"] == 4
    dora = adapter.get("use_dora")
    if kind(adapter) == ADALORA and bytes_each == 4:
        casts = 4.0 * rank * inputs  # the product with the singular values; under autocast it is the cast that is kept
    if adapter.get("lora_dropout"):
        # What is left of the input, and a mask of a byte each.
        return Kept(token + (bytes_each + 1.0) * inputs, casts)
    if dora:
        # Over 4-bit layers the result is float32, and so is what follows; attention gives its own in 16 bits.
        wide = bytes_each == 2 and four_bit
        in_attention = sum(linear.inputs + linear.outputs for linear in layers if linear.name == "o_proj")
        token += outputs * (bytes_each + (4 if wide else bytes_each)) - (2 * in_attention if wide else 0)
        own = bytes_each * inputs if copies or wide else 0
        return Kept(token + own, casts, frozenset() if own else _inputs(layers), wide)
    if copies:
        return Kept(token + bytes_each * inputs, casts)
    return Kept(token, casts, _inputs(layers))


def _ia3(layers: list[Linear], adapter: Mapping[str, Any], quant: Mapping[str, Any], bytes_each: int) -> Kept:
    # PEFT's layer for plain linear layers copies its input in float32; this project's for quantized ones does not.
    copied = bytes_each if quant["method"] in ("bitsandbytes", "gptqmodel") else 4
    scaled = adapter["feedforward_modules"]
    return Kept(float(sum(copied * one.inputs if one.name in scaled else bytes_each * one.outputs for one in layers)))
