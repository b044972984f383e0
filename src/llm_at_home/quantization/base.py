"""Loads the base model that a configuration names, and says which linear layers really run."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.models import source
from llm_at_home.models.loading import load_config
from llm_at_home.quantization.layers import kind, library, linear_layers

METHODS = ("dense", "bitsandbytes", "rtn", "torchao", "gptqmodel", "gguf")


def method_of(quant: Mapping[str, Any]) -> Any:
    """The module of this method's family: it has ``check(config)`` and ``load(config)``."""
    if quant["method"] not in METHODS:
        raise ValueError(f"quant.method={quant['method']} is none of {', '.join(METHODS)}")
    return importlib.import_module(f"llm_at_home.quantization.{quant['method']}")


def complete(config: dict[str, Any], named: Collection[str]) -> None:
    """Fill in, while a configuration is resolved, what a file or checkpoint that it names decides.

    Args:
        config: changed in place.
        named: the keys that the user gave, which stay as they are.
    """
    method = method_of(config["quant"])
    if hasattr(method, "complete"):
        method.complete(config, named)


def check(config: Mapping[str, Any]) -> None:
    """Refuse, before anything loads, a combination that this method cannot do.

    Raises:
        Refusal: with one line that says what to change.
    """
    refuse_quantized(config["quant"], source.quantized_as(config["model"]))
    method_of(config["quant"]).check(config)


def refuse_quantized(quant: Mapping[str, Any], stored: str | None) -> None:
    """Refuse a source that is quantized already, unless it is read as what it is.

    Args:
        quant: the ``quant`` group.
        stored: the method that the source's own configuration names, or None.

    Raises:
        Refusal: naming the choice that reads it.
    """
    if stored is None or quant["method"] == "gptqmodel" or quant["method"] == stored == "gguf":
        return
    choice = {"gptq": "gptq", "awq": "awq", "exl3": "exl", "gguf": "gguf"}.get(stored)
    hint = f"read it with quant={choice}" if choice else "give the unquantized model"
    raise Refusal(f"model.source is quantized already ({stored}), so quant={quant['name']} would be untrue: {hint}")


def needs_making(config: Mapping[str, Any]) -> bool:
    """Whether a job of this resolved configuration needs a quantized checkpoint that is not in the cache yet."""
    needs = getattr(method_of(config["quant"]), "needs_making", None) if "quant" in config else None
    return bool(needs and needs(config))


def load_base(config: Mapping[str, Any]) -> Any:
    """The base model of a resolved configuration, quantized as it says, in evaluation mode on its device.

    Raises:
        RuntimeError: when a quantization was asked for and plain linear layers are left in the decoder.
    """
    if config["model"]["weights"] != "random":
        stored = getattr(load_config(config["model"]), "quantization_config", None)
        refuse_quantized(config["quant"], stored and str(stored.get("quant_method")))
    method = method_of(config["quant"])
    model = method.load(config)
    if config["quant"]["method"] != "dense" and not getattr(method, "DENSE_COPY", False):
        plain = [name for name, module in linear_layers(model) if kind(module) == "Linear"]
        if plain:
            raise RuntimeError(f"{len(plain)} layers were left unquantized, {plain[0]} the first")
    return model


def describe_kernel(model: Any) -> dict[str, Any]:
    """The classes of the linear layers that were instantiated, with counts, and the backend that runs them."""
    import torch

    file = getattr(model, "llm_at_home_gguf", None)
    if file is not None:
        from llm_at_home.quantization.gguf_file import kernel

        return kernel(file, {"backend": f"dequantized, torch {next(model.parameters()).device.type}"})
    layers = [module for _, module in linear_layers(model)]
    counts = Counter(kind(layer) for layer in layers)
    main = counts.most_common(1)[0][0] if counts else "none"
    package = next((library(layer) for layer in layers if kind(layer) == main), "torch")
    device = next(model.parameters()).device.type
    states = [getattr(getattr(module, "weight", None), "quant_state", None) for module in model.modules()]
    # bitsandbytes repacks at the first call without gradients, and computes in bfloat16 from then on.
    repacked = any(getattr(state, "packing_format_for_cpu", False) for state in states)
    return {
        "linear": main,
        "layers": dict(counts),
        "backend": f"{package} {device}" + (" avx512bf16" if repacked else ""),
        "attention": getattr(model.config, "_attn_implementation", "unknown"),
        "threads": torch.get_num_threads() if device == "cpu" else None,
    }
