"""Models made from their architecture alone: true in memory, speed and energy, and in nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llm_at_home.errors import Refusal


@dataclass(frozen=True)
class Quantized:
    """How the linear layers of a quantization method get random weights.

    Args:
        replace: puts the method's layers into a model that has shapes but no memory yet.
        layers: their classes.
        fill: gives one of them the dense weight, of shape (outputs, inputs), that it is to quantize.
    """

    replace: Callable[[Any], None]
    layers: tuple[Any, ...]
    fill: Callable[[Any, torch.Tensor], None]


def build(config: Any, dtype: torch.dtype, device: str, quantized: Quantized | None = None) -> Any:
    """A causal language model with random weights, made layer by layer on the device.

    Args:
        config: a transformers configuration.
        dtype: of the weights.
        device: ``cpu`` or ``cuda``.
        quantized: for a quantized model; only one of its layers is ever dense.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if quantized is not None:
        quantized.replace(model)
    torch.manual_seed(0)
    spread = getattr(config, "initializer_range", 0.02)
    made: dict[int, torch.nn.Parameter] = {}
    for module in list(model.modules()):
        if quantized is not None and isinstance(module, quantized.layers):
            shape = (module.out_features, module.in_features)
            quantized.fill(module, torch.empty(shape, dtype=dtype, device=device).normal_(0, spread))
            if getattr(module, "bias", None) is not None and module.bias.is_meta:
                module.bias = torch.nn.Parameter(torch.zeros(shape[0], dtype=dtype, device=device))
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:  # tied weights stay tied
                data = torch.empty(parameter.shape, dtype=dtype, device=device)
                data = data.fill_(1.0) if parameter.dim() == 1 else data.normal_(0, spread)
                made[id(parameter)] = torch.nn.Parameter(data, requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
    _make_buffers(model, config, device)
    return model.eval()


def _make_buffers(model: Any, config: Any, device: str) -> None:
    """Rotary frequencies are computed when a module is made, which on the meta device gave them no values.

    Raises:
        Refusal: for an architecture that keeps other buffers, whose values would be garbage.
    """
    for name, module in list(model.named_modules()):
        if not any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            continue
        if "rotary" not in name:
            raise Refusal(f"model.weights=random cannot make {name} of this architecture: use model.weights=pretrained")
        model.set_submodule(name, type(module)(config=config).to(device))
