"""Bits go where the loss rises most, within the target."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from llm_at_home.errors import Refusal
from llm_at_home.quantization.mixed_bits import CHOICES, Layer, choose, sensitivity, stored_bits

GROUP = 64


def average(layers, chosen):
    bits = sum(layer.weights * stored_bits(chosen[name], GROUP) + layer.index_bits for name, layer in layers.items())
    return bits / sum(layer.weights for layer in layers.values())


def rise(layers, chosen):
    return sum(layer.rise[chosen[name]] for name, layer in layers.items())


def some_layers(count, seed):
    generator = random.Random(seed)
    made = {}
    for i in range(count):
        worst = generator.lognormvariate(0, 2)
        falls = {bits: worst * generator.uniform(0.5, 1.5) * 4.0 ** -(bits - 2) for bits in CHOICES}
        made[f"layer{i}"] = Layer(generator.choice([1000, 3000]), falls, index_bits=generator.choice([0, 100]))
    return made


@pytest.mark.parametrize("target", [2.5, 3.5, 4.2, 6.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_target_is_kept_and_the_choice_is_close_to_the_best(target, seed):
    layers = some_layers(6, seed)
    chosen = choose(layers, target, GROUP)
    assert average(layers, chosen) <= target
    every = [dict(zip(layers, bits, strict=True)) for bits in itertools.product(CHOICES, repeat=6)]
    best = min(rise(layers, other) for other in every if average(layers, other) <= target)
    uniform = [
        rise(layers, dict.fromkeys(layers, bits)) for bits in CHOICES if stored_bits(bits, GROUP) + 0.1 <= target
    ]
    assert rise(layers, chosen) <= min(uniform, default=float("inf"))
    # the greedy choice leaves at most one step of one layer undone
    assert rise(layers, chosen) <= best + max(layer.rise[2] for layer in layers.values()) / 2


def test_more_room_is_never_worse():
    layers = some_layers(20, 7)
    rises = [rise(layers, choose(layers, target, GROUP)) for target in (2.5, 3.0, 3.5, 4.0, 5.0, 8.0)]
    assert rises == sorted(rises, reverse=True)


def test_the_sensitive_layer_gets_the_bits():
    quiet, loud = {2: 0.01, 3: 0.002, 4: 0.0005, 8: 0.0}, {2: 10.0, 3: 2.0, 4: 0.5, 8: 0.0}
    chosen = choose({"quiet": Layer(1000, quiet), "loud": Layer(1000, loud)}, 5.5, GROUP)
    assert chosen == {"quiet": 2, "loud": 8}


def test_a_target_that_nothing_meets_is_refused():
    with pytest.raises(Refusal, match="give at least"):
        choose(some_layers(3, 0), 2.0, GROUP)


def test_sensitivity_is_the_fisher_weighted_rounding_error(wide_model):
    from transformers import AutoModelForCausalLM

    from llm_at_home.quantization.rtn_linear import quantize

    model = AutoModelForCausalLM.from_pretrained(wide_model, dtype=torch.float32).eval()
    texts = [list(range(5, 40)), list(range(100, 120))]
    found = sensitivity(model, texts, GROUP, symmetric=True)
    assert len(found) == 14
    assert all(layer.rise[2] > layer.rise[3] > layer.rise[4] > layer.rise[8] > 0 for layer in found.values())
    name = "model.layers.1.mlp.up_proj"
    weight = model.get_submodule(name).weight
    weight.requires_grad_(True)
    fisher = torch.zeros_like(weight)
    for ids in texts:
        batch = torch.tensor([ids])
        (gradient,) = torch.autograd.grad(model(input_ids=batch, labels=batch).loss, weight)
        fisher += gradient**2 / len(texts)
    codes, scale, zero = quantize(weight, 3, "symmetric", "group", GROUP)
    error = ((codes - zero) * scale).reshape(weight.shape) - weight.detach()
    assert found[name].rise[3] == pytest.approx(0.5 * float((fisher * error**2).sum()), rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())
