"""A fresh tiny base, and the same adapter made by this project and by PEFT."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

IDS = torch.arange(50, 80).reshape(1, 30)


@pytest.fixture
def base(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture
def make_base(tiny_model):
    return lambda: AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def randomize(model, seed=0):
    """Move every trained parameter off its start, the same in each model with the same names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def gradients(model):
    """The gradients of a loss that looks at every logit."""
    (model(IDS).logits.float() ** 2).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
