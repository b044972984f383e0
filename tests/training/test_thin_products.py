"""Thin products that are arranged before they are compiled: fewer, with the same gradients, and none but those."""

from __future__ import annotations

import pytest
import torch
from peft import AdaLoraConfig, LoKrConfig, LoraConfig, get_peft_model
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from llm_at_home.adapters import methods
from llm_at_home.training import thin_products

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def counted(monkeypatch):
    """What was arranged in each graph that is compiled."""
    torch._dynamo.reset()
    counts, arrange = [], thin_products.arrange
    monkeypatch.setattr(thin_products, "arrange", lambda module: counts.append(arrange(module)))
    return counts


LORA = {"r": 4, "lora_alpha": 12, "init_lora_weights": False}


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (LoraConfig(**LORA, target_modules=NAMES), {"stacked": 5, "scaled": 7}),
        # Each module's dropout makes an input of its own.
        (LoraConfig(**LORA, target_modules=NAMES, lora_dropout=0.5), {"stacked": 0, "scaled": 7}),
        (LoraConfig(**LORA, target_modules=["q_proj", "o_proj"]), {"stacked": 0, "scaled": 2}),
        (LoraConfig(r=32, target_modules=NAMES, init_lora_weights=False), {"stacked": 0, "scaled": 0}),  # not thin
        (AdaLoraConfig(init_r=4, target_r=2, total_step=100, target_modules=NAMES), {"stacked": 5, "scaled": 7}),
        (LoKrConfig(r=2, decompose_factor=2, init_weights=False, target_modules=NAMES), {"stacked": 5, "scaled": 0}),
    ],
    ids=["lora", "dropout", "two", "wide", "adalora", "lokr"],
)
def test_adapters_keep_their_gradients(counted, config, found):
    methods.register(methods.FACTORED)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(1)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=100, **shape)), config).train()
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)
        elif parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(100, (2, 24))

    def gradients():
        torch.manual_seed(2)
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    wanted = gradients()
    model.zero_grad()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(backend=thin_products.backend("aot_eager"), dynamic=False, fullgraph=True)
    for name, value in gradients().items():
        assert wanted[name].abs().max() > 1e-5
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-6, msg=name)
    assert counted == [found, found]


def drawn(*shape, trained=True):
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).requires_grad_(trained)


def both(function, *given):
    """What a function and its compiled form give, and their gradients."""
    compiled = torch.compile(function, backend=thin_products.backend("aot_eager"), fullgraph=True)
    trained = [one for one in given if one.requires_grad]
    outputs = [function(*given), compiled(*given)]
    return [(output, *torch.autograd.grad(output.square().sum(), trained)) for output in outputs]


def changed_between(x, a, b):
    x = x * 2
    first = linear(x.to(torch.float64), a)
    x.add_(1)
    return torch.cat([first, linear(x.to(torch.float64), b)], -1)


def cast_apart(x, a, b):
    return torch.cat([linear(x.to(torch.float64), a), linear(x.to(torch.float32), b.float())], -1)


def with_bias(x, a, b):
    x = x.double()
    return torch.cat([linear(x, a, a[:, 0]), linear(x, b, b[:, 0])], -1)


def of_the_other(x, a, b):
    x = x.double()
    return linear(linear(x, a) @ torch.ones(8, 96, dtype=x.dtype), b) + linear(x, a)


@pytest.mark.parametrize("function", [changed_between, cast_apart, with_bias, of_the_other])
def test_what_only_looks_like_one_input_stays_apart(counted, function):
    x, (a, b) = drawn(5, 96, trained=False), (drawn(8, 96).double().detach().requires_grad_() for _ in range(2))
    wanted, found = both(function, x, a, b)
    for pair in zip(found, wanted, strict=True):
        torch.testing.assert_close(*pair)
    assert counted[0]["stacked"] == (2 if function is of_the_other else 0)


def test_products_under_another_autocast_stay_apart(counted):
    def function(x, a, b):
        with torch.autocast("cpu", torch.bfloat16):
            first = linear(x, a)
        return first + linear(x, b)

    wanted, found = both(function, drawn(5, 96), drawn(8, 96), drawn(9, 96)[:8].detach().requires_grad_())
    torch.testing.assert_close(found[0], wanted[0])
    assert counted[0]["stacked"] == 0


def changed_after(x, a, b):
    first = linear(x, a)
    first += 1
    first[:, :2].mul_(3)
    return torch.cat([first, linear(x, b)], -1)


def of_computed_weights(x, a, b):
    first = linear(x, a)
    twice = b * 2
    return torch.cat([first, linear(x, twice.sin() * twice)], -1)


def of_recomputed_weights(x, a, b):
    return linear(x, checkpoint(torch.sin, a, use_reentrant=False)) + linear(x, b)


def of_what_the_other_gives(x, a, b):
    first = linear(x, a)
    return torch.cat([first, linear(x, b + first.mean())], -1)


@pytest.mark.parametrize(
    ("function", "stacked"),
    [(changed_after, 2), (of_computed_weights, 2), (of_recomputed_weights, 0), (of_what_the_other_gives, 0)],
)
def test_what_is_made_of_products_and_what_weights_are_made_of(counted, function, stacked):
    wanted, found = both(function, drawn(5, 96), drawn(8, 96), drawn(9, 96)[:8].detach().requires_grad_())
    for pair in zip(found, wanted, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
    assert counted[0]["stacked"] == stacked


def test_weights_that_are_stacked_products_are_not_stacked_again(counted):
    shapes = [(5, 96), (8, 960), (960, 96), (960, 96)]
    given = [drawn(*shape).double().detach().requires_grad_() for shape in shapes]
    wanted, found = both(lambda x, whole, a, b: linear(x, whole @ a) + linear(x, whole @ b).square(), *given)
    for pair in zip(found, wanted, strict=True):
        torch.testing.assert_close(*pair)
    assert counted[0]["stacked"] == 2


def test_frozen_weights_stay_apart(counted):
    both(lambda x, a, b: linear(x, a) + linear(x, b), drawn(5, 96), *(drawn(8, 96, trained=False) for _ in range(2)))
    assert counted[0] == {"stacked": 0, "scaled": 0}


def into_a_sum(u, product):
    total = u[:, :1] * u.new_ones(96)
    total += product
    return total


def under_autocast(u, b):
    with torch.autocast("cpu", torch.bfloat16):
        return linear(u, b)


@pytest.mark.parametrize(
    ("function", "scaled"),
    [
        (lambda u, b, s: linear(u, b) * 3 / 7, 1),
        (lambda u, b, s: (u @ b.T) / (s.detach() + 1), 1),
        (lambda u, b, s: linear(u, b) * s, 0),  # the scale is trained
        (lambda u, b, s: linear(u, b) * u[:, :1], 0),  # by the row
        (lambda u, b, s: 3 / linear(u, b).square().add(1), 0),
        (lambda u, b, s: (y := linear(u, b)) * 3 + y, 0),  # used twice
        (lambda u, b, s: linear(u.float(), b.float()) * s.detach().double(), 0),  # which widens the sum
        (lambda u, b, s: linear(u.float(), b.float()) * s.detach().double() * 3, 0),
        (lambda u, b, s: into_a_sum(u.float(), linear(u.float(), b.float()) * s.detach().double()), 0),
        (lambda u, b, s: into_a_sum(u, linear(u, b) * s.detach()), 1),
        (lambda u, b, s: linear(u, b) * s.detach()[None, None], 0),  # which has more dimensions
        (lambda u, b, s: under_autocast(u.float(), b.float()) * 3, 0),
    ],
)
def test_a_product_s_scale_goes_to_its_weights_where_nothing_else_sees_it(counted, function, scaled):
    given = [drawn(5, 8).double(), drawn(96, 8).double(), drawn(1).double()]
    wanted, found = both(lambda *one: function(*one) + 0 * one[2], *(one.detach().requires_grad_() for one in given))
    for pair in zip(found, wanted, strict=True):
        torch.testing.assert_close(*pair)
    assert counted[0]["scaled"] == scaled
