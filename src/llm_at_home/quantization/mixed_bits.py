"""Chooses the bits of each layer so that the average meets a target and the model's loss rises least.

The rise that a layer's rounding error E causes is estimated by its diagonal Fisher information, the sum over weights of
g^2 E^2 with g the gradient of the loss on a calibration text (Kim et al. 2023, "SqueezeLLM", section 4.1), for the E of
plain rounding at each number of bits. The choice is then a knapsack, solved greedily along each layer's convex hull.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_at_home.errors import Refusal

CHOICES = (2, 3, 4, 8)
# Raised whenever the same texts and target would give other bits.
VERSION = 1


@dataclass(frozen=True)
class Layer:
    """A linear layer.

    Args:
        weights: how many it has.
        rise: the estimated rise of the loss (nats a token) at each number of bits.
        index_bits: that the format spends on the order of its columns, whatever the codes: 32 for each input.
    """

    weights: int
    rise: Mapping[int, float]
    index_bits: int = 0


def stored_bits(bits: int, group_size: int) -> float:
    """Bits that a weight takes in GPTQ's format: its code, and its share of a float16 scale and a packed zero point."""
    return bits + (16 + bits) / group_size


def choose(layers: Mapping[str, Layer], target: float, group_size: int) -> dict[str, int]:
    """The bits of each layer.

    Args:
        layers: by name.
        target: stored bits per weight, averaged over all weights of these layers, that are not to be exceeded.
        group_size: inputs that share a scale.

    Raises:
        Refusal: when even the fewest bits everywhere exceed the target.
    """
    chosen = {name: min(layer.rise) for name, layer in layers.items()}
    budget = sum(target * layer.weights - layer.index_bits for layer in layers.values())
    spent = sum(layer.weights * stored_bits(chosen[name], group_size) for name, layer in layers.items())
    if spent > budget:
        least = target + (spent - budget) / sum(layer.weights for layer in layers.values())
        raise Refusal(f"quant.target_bits={target} is out of reach for this model: give at least {least:.2f}")
    steps = [(gain, name, low, high) for name, layer in layers.items() for gain, low, high in _hull(layer, group_size)]
    # A layer's gains fall along its hull, so that in this order no step comes before the one below it.
    for _, name, low, high in sorted(steps, key=lambda step: -step[0]):
        cost = layers[name].weights * (stored_bits(high, group_size) - stored_bits(low, group_size))
        if chosen[name] == low and spent + cost <= budget:
            chosen[name] = high
            spent += cost
    return chosen


def _hull(layer: Layer, group_size: int) -> list[tuple[float, int, int]]:
    """The steps up a layer's lower convex hull: (fall of the rise per stored bit, bits before, bits after)."""
    options = sorted(layer.rise)
    steps = []
    low = options[0]
    while low != options[-1]:
        gains = {
            high: (layer.rise[low] - layer.rise[high])
            / (layer.weights * (stored_bits(high, group_size) - stored_bits(low, group_size)))
            for high in options
            if high > low
        }
        best = max(gains, key=lambda high: gains[high])
        if gains[best] <= 0:
            break
        steps.append((gains[best], low, best))
        low = best
    return steps


def choose_for(
    model: Any, texts: Sequence[Sequence[int]], target: float, group_size: int, symmetric: bool
) -> dict[str, int]:
    """Measure the layers of a dense model on calibration texts and choose their bits.

    Args:
        model: the dense model; its gradients are used and dropped again.
        texts: token ids of each text.
        target: stored bits per weight.
        group_size: inputs that share a scale.
        symmetric: whether codes are symmetric.
    """
    return choose(sensitivity(model, texts, group_size, symmetric), target, group_size)


def sensitivity(model: Any, texts: Sequence[Sequence[int]], group_size: int, symmetric: bool) -> dict[str, Layer]:
    """Each decoder layer's estimated rise of the loss, in nats a token, at 2, 3, 4 and 8 bits.

    The gradients of one text are held at a time, layer by layer as the backward pass reaches them.
    """
    import torch

    from llm_at_home.quantization.layers import linear_layers

    layers = dict(linear_layers(model))
    fisher = {name: torch.zeros_like(layer.weight, dtype=torch.float32) for name, layer in layers.items()}
    model.requires_grad_(False)
    hooks = []
    for name, layer in layers.items():
        layer.weight.requires_grad_(True)

        def collect(parameter: Any, name: str = name) -> None:
            fisher[name] += parameter.grad.float() ** 2
            parameter.grad = None

        hooks.append(layer.weight.register_post_accumulate_grad_hook(collect))
    try:
        for ids in texts:
            batch = torch.tensor([list(ids)], device=model.device)
            model(input_ids=batch, labels=batch).loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.requires_grad_(False)
    return {
        name: _layer(layer.weight, fisher.pop(name) / len(texts), group_size, symmetric)
        for name, layer in layers.items()
    }


def _layer(weight: Any, fisher: Any, group_size: int, symmetric: bool) -> Layer:
    from llm_at_home.quantization.rtn_linear import quantize

    rise = {}
    for bits in CHOICES:
        codes, scale, zero = quantize(weight, bits, "symmetric" if symmetric else "asymmetric", "group", group_size)
        error = ((codes.float() - zero) * scale).reshape(weight.shape) - weight.float()
        rise[bits] = 0.5 * float((fisher * error**2).sum())
    return Layer(weight.numel(), rise, index_bits=32 * weight.shape[1])
