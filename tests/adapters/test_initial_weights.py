"""PiSSA and LoftQ: LoRA that starts elsewhere, and comes back from its files as it was."""

from __future__ import annotations

import pytest
import torch

from llm_at_home.adapters.attach import attach_saved, prepare_for_training

from .conftest import IDS

LORA = {"name": "lora", "trains": "adapter", "_target_": "peft.LoraConfig", "task_type": "CAUSAL_LM"}
LORA |= {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"}
PISSA = {**LORA, "init_lora_weights": "pissa", "lora_alpha": 4}
LOFTQ = {**LORA, "loftq": True, "lora_alpha": 2}


def test_pissa_starts_as_the_base_with_its_strongest_directions_trained(base, make_base, tmp_path):
    weight = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    with torch.no_grad():
        before = base(IDS).logits
        model = prepare_for_training(base, PISSA)
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-3, atol=1e-4)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    update = layer.get_delta_weight("default").detach()
    u, s, v = torch.linalg.svd(weight)
    torch.testing.assert_close(update, (u[:, :8] * s[:8]) @ v[:8], rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.1)
        trained = model.eval()(IDS).logits
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(attach_saved(make_base(), tmp_path)(IDS).logits, trained, rtol=1e-3, atol=1e-4)


@pytest.fixture
def quantized(tiny_model):
    from hydra import compose, initialize_config_dir

    from llm_at_home.quantization.base import load_base
    from llm_at_home.tasks import resolve

    from .test_compatibility import CONF

    words = ["quant=nf4", "model=custom", f"model.source={tiny_model}", "gpu=cpu", "adapter=lora_loftq", "adapter.r=8"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = resolve.resolve("train", compose("train", words), words)
    return lambda: load_base(config)


def test_loftq_without_a_four_bit_base_is_refused(base):
    with pytest.raises(ValueError, match="quant=nf4"):
        prepare_for_training(base, LOFTQ)


def test_loftq_starts_nearer_to_the_unquantized_weights(quantized, base, tmp_path):
    def error(layer, update):
        wanted = base.model.layers[0].self_attn.q_proj.weight.detach()
        rounded = layer(torch.eye(layer.in_features)).T.detach()
        return float((rounded + update - wanted).norm())

    model = prepare_for_training(quantized(), LOFTQ)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    update = layer.get_delta_weight("default").detach()
    own = layer.get_base_layer()
    assert error(own, update) < 0.95 * error(own, torch.zeros_like(update))
    with torch.no_grad():
        started = model.eval()(IDS).logits
    # No matrix of this rank is nearer: the rest is the tail of the singular values.
    left_out = base.model.layers[0].self_attn.q_proj.weight.detach() - own(torch.eye(own.in_features)).T.detach()
    tail = torch.linalg.svdvals(left_out)[8:].square().sum().sqrt()
    assert error(own, update) == pytest.approx(float(tail), rel=1e-3)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(attach_saved(quantized(), tmp_path)(IDS).logits, started, rtol=1e-3, atol=1e-4)
