"""AdaLoRA and IA3 on a base whose layers are no torch.nn.Linear compute what PEFT's do on a dense one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llm_at_home.adapters.attach import prepare_for_training

from .conftest import IDS, gradients, randomize

COMMON = {"trains": "adapter", "task_type": "CAUSAL_LM"}
ADALORA = {**COMMON, "name": "adalora", "_target_": "peft.AdaLoraConfig", "init_r": 4, "target_r": 2}
ADALORA |= {"target_modules": "all-linear", "schedule": {"initial": 0.1, "final": 0.3}}
IA3 = {**COMMON, "name": "ia3", "_target_": "peft.IA3Config"}
IA3 |= {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


class Packed(nn.Module):
    """A linear layer as GPTQModel's are, which hides a dense one."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.detach().clone())

    def forward(self, x):
        return nn.functional.linear(x, self.qweight)


def packed(model):
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            model.set_submodule(name, Packed(module))
    return model


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("adapter", [ADALORA, IA3], ids=lambda adapter: adapter["name"])
def test_values_and_gradients_are_those_on_a_dense_base(make_base, adapter):
    dense = prepare_for_training(make_base(), adapter, steps=20)
    hidden = prepare_for_training(packed(make_base()), adapter, steps=20)
    randomize(dense)
    randomize(hidden)
    torch.testing.assert_close(hidden(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)
    wanted = gradients(dense)
    found = gradients(hidden)
    assert set(found) == set(wanted)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-7, msg=name)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_a_packed_ia3_is_not_merged(make_base):
    model = prepare_for_training(packed(make_base()), IA3)
    with pytest.raises(ValueError, match="quant=none"):
        model.merge_and_unload()


def test_adalora_s_constant_is_not_trained_on_a_16_bit_base(make_base):
    model = prepare_for_training(make_base().to(torch.bfloat16), ADALORA, steps=20)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert not any("ranknum" in name for name in trained)
