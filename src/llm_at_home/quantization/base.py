"""Loads the base model that a configuration names, and says which linear layers really run."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

METHODS = ("dense", "bitsandbytes", "rtn")


def method_of(quant: Mapping[str, Any]) -> Any:
    """The module of this method's family: it has ``check(config)`` and ``load(config)``."""
    if quant["method"] not in METHODS:
        raise ValueError(f"quant.method={quant['method']} is none of {', '.join(METHODS)}")
    return importlib.import_module(f"llm_at_home.quantization.{quant['method']}")


def check(config: Mapping[str, Any]) -> None:
    """Refuse, before anything loads, a combination that this method cannot do.

    Raises:
        Refusal: with one line that says what to change.
    """
    method_of(config["quant"]).check(config)


def load_base(config: Mapping[str, Any]) -> Any:
    """The base model of a resolved configuration, quantized as it says, in evaluation mode on its device.

    Raises:
        RuntimeError: when a quantization was asked for and plain linear layers are left in the decoder.
    """
    model = method_of(config["quant"]).load(config)
    if config["quant"]["method"] != "dense":
        plain = [name for name, kind in _linear_layers(model) if kind == "Linear"]
        if plain:
            raise RuntimeError(f"{len(plain)} layers were left unquantized, {plain[0]} the first")
    return model


def _linear_layers(model: Any) -> list[tuple[str, str]]:
    """Names and classes of the linear layers, without the output head and without an adapter's own."""
    import torch

    head = model.get_output_embeddings()
    return [
        (name, type(module).__name__)
        for name, module in model.named_modules()
        if module is not head and isinstance(module, torch.nn.Linear) and "lora_" not in name
    ]


def describe_kernel(model: Any) -> dict[str, Any]:
    """The classes of the linear layers that were instantiated, with counts, and the backend that runs them."""
    import torch

    counts = Counter(kind for _, kind in _linear_layers(model))
    weights = next(model.parameters())
    main = counts.most_common(1)[0][0] if counts else "none"
    library = "bitsandbytes" if main in ("Linear4bit", "Linear8bitLt") else "torch"
    states = [getattr(getattr(module, "weight", None), "quant_state", None) for module in model.modules()]
    # bitsandbytes repacks at the first call without gradients, and computes in bfloat16 from then on.
    repacked = any(getattr(state, "packing_format_for_cpu", False) for state in states)
    return {
        "linear": main,
        "layers": dict(counts),
        "backend": f"{library} {weights.device.type}" + (" avx512bf16" if repacked else ""),
        "attention": getattr(model.config, "_attn_implementation", "unknown"),
        "threads": torch.get_num_threads() if weights.device.type == "cpu" else None,
    }
