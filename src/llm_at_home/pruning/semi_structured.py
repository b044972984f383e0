"""2:4 weights in the form that a GPU's sparse tensor cores multiply with, through torch's semi-structured tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llm_at_home.errors import Refusal
from llm_at_home.models import random_weights
from llm_at_home.models.loading import load_config
from llm_at_home.pruning import magnitude
from llm_at_home.pruning.pattern import Pattern
from llm_at_home.quantization.layers import linear_layers

# Either library of kernels takes these: outputs and inputs of a layer in multiples of so many (16-bit floats).
OUTPUTS, INPUTS = 32, 64


def convert(model: Any) -> None:
    """Replace the weights of the decoder's linear layers, one by one, by half of their entries and where they stand.

    Raises:
        Refusal: for a layer whose shape the kernels do not take.
    """
    for name, layer in linear_layers(model):
        layer.weight = sparse(layer.weight, name)


def random_model(config: Mapping[str, Any]) -> Any:
    """A model with random weights, pruned by magnitude layer by layer, of which only one is ever there whole."""
    pattern, prune = Pattern.of(config["prune"]), config["prune"]

    class Pending(torch.nn.Linear):
        """A layer that waits for its weight; pruning keeps a layer's class, so only this tells it from the head."""

    def mark(model: Any) -> None:
        for _, layer in linear_layers(model):
            layer.__class__ = Pending

    def fill(layer: Any, weight: torch.Tensor) -> None:
        layer.__class__ = torch.nn.Linear
        pruned = magnitude.prune(weight, None, pattern, prune)
        converted = sparse(pruned) if prune["kernel"] == "semi_structured" else None
        layer.weight = torch.nn.Parameter(pruned, requires_grad=False) if converted is None else converted

    return random_weights.build(
        load_config(config["model"]),
        getattr(torch, config["dtype"]),
        config["gpu"]["device"],
        random_weights.Quantized(mark, (Pending,), fill),
    )


def sparse(weight: torch.Tensor, name: str = "") -> torch.nn.Parameter:
    """A 2:4 weight, of shape (outputs, inputs), as the layer's parameter for torch's sparse kernels: cuSPARSELt's where
    this torch has them, else CUTLASS's.

    Args:
        weight: on a GPU, in 16 bits; what is not 2:4 in it is lost without an error.
        name: of the layer, for the message.

    Raises:
        Refusal: for a shape that the kernels do not take.
    """
    outputs, inputs = weight.shape
    if outputs % OUTPUTS or inputs % INPUTS:
        raise Refusal(
            f"prune.kernel=semi_structured takes no layer of {outputs} outputs and {inputs} inputs"
            f"{f' ({name})' if name else ''}: use prune.kernel=dense"
        )
    kinds = torch.sparse.SparseSemiStructuredTensorCUSPARSELT, torch.sparse.SparseSemiStructuredTensorCUTLASS
    kind = kinds[0] if torch.backends.cusparselt.is_available() else kinds[1]
    return torch.nn.Parameter(kind.from_dense(weight.detach().contiguous()), requires_grad=False)
