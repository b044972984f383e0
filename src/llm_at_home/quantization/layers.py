"""Which modules of a model are its linear layers, dense or quantized by whatever library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# What adapters call their own parts, in which linear layers may stand that are not the base's.
ADAPTER_PARTS = ("lora_", "bottleneck_", "prompt_encoder")


def linear_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Names and modules of the linear layers, without the output head and without an adapter's own.

    GPTQModel's layers are no subclasses of ``torch.nn.Linear``; what all have is ``in_features`` and ``out_features``.
    """
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        is_linear = hasattr(module, "in_features") and hasattr(module, "out_features")
        is_wrapper = hasattr(module, "base_layer")  # an adapter's layer around the one that is meant
        if is_linear and module is not head and not is_wrapper and not any(p in name for p in ADAPTER_PARTS):
            yield name, module


def kind(module: Any) -> str:
    """The class of a linear layer, and its weight's where that was replaced, as torchao and 2:4 sparsity do."""
    weight = getattr(module, "weight", None)
    name = type(module).__name__
    if name == "Linear" and type(weight).__module__.startswith("torchao."):
        rounds_activations = getattr(weight, "act_quant_kwargs", None) is not None
        return f"Linear[{type(weight).__name__}{', dynamic activations' if rounds_activations else ''}]"
    if name == "Linear" and type(weight).__module__ == "torch.sparse.semi_structured":
        return f"Linear[{type(weight).__name__}]"
    return name


def library(module: Any) -> str:
    """The package whose code multiplies with this layer's weight."""
    owners = (type(getattr(module, "weight", None)).__module__, type(module).__module__)
    for owner in owners:
        package = owner.split(".")[0]
        if package in ("torchao", "bitsandbytes", "gptqmodel"):
            return package
    return "torch"
