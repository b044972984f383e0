"""What is loaded is what was asked for, and its gradients are right."""

from __future__ import annotations

import copy

import pytest
import torch

from llm_at_home.quantization import base, bitsandbytes

from .conftest import LORA, loadable, lora_gradients

NF4 = {
    "name": "nf4",
    "method": "bitsandbytes",
    "bits": 4,
    "config": {"_target_": "transformers.BitsAndBytesConfig", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}
INT8 = {
    "name": "int8",
    "method": "bitsandbytes",
    "bits": 8,
    "config": {"_target_": "transformers.BitsAndBytesConfig", "load_in_8bit": True},
}


@pytest.mark.parametrize(("quant", "kind"), [(NF4, "Linear4bit"), (INT8, "Linear8bitLt")])
def test_the_kernel_is_named_and_no_layer_is_left_plain(tiny_model, quant, kind):
    model = base.load_base(loadable(tiny_model, quant))
    kernel = base.describe_kernel(model)
    assert kernel["layers"] == {kind: 14}
    assert kernel["backend"].startswith("bitsandbytes cpu")


def test_a_layer_that_stays_plain_is_an_error(tiny_model, monkeypatch):
    load = bitsandbytes.load

    def with_one_plain_layer(options):
        model = load(options)
        model.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 128, bias=False)
        return model

    monkeypatch.setattr(bitsandbytes, "load", with_one_plain_layer)
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.up_proj"):
        base.load_base(loadable(tiny_model, NF4))


def dequantized(model):
    """A dense copy with the values that the 4-bit layers stand for."""
    from bitsandbytes.functional import dequantize_4bit

    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if type(module).__name__ == "Linear4bit":
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight.data = weight.float()
            dense.set_submodule(name, linear)
    return dense


def test_gradients_on_nf4_equal_those_of_its_dequantized_copy(tiny_model):
    quantized = base.load_base(loadable(tiny_model, NF4, adapter=LORA))
    dense = dequantized(quantized)
    expected, found = lora_gradients(dense, LORA), lora_gradients(quantized, LORA)
    for (name, a), (_, b) in zip(expected.items(), found.items(), strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-3, name


def test_a_training_run_keeps_the_kernel_with_right_gradients(tiny_model):
    for_training = base.load_base(loadable(tiny_model, NF4, adapter=LORA))
    layers = [m for m in for_training.modules() if type(m).__name__ == "Linear4bit"]
    assert layers
    assert all(layer.support_avx512bf16_for_cpu is False for layer in layers)


@pytest.mark.parametrize(("quant", "kind"), [(NF4, "Linear4bit"), (INT8, "Linear8bitLt")])
def test_random_weights_are_quantized_as_read_ones_are(tiny_model, quant, kind):
    shape = {
        "model_type": "llama",
        "vocab_size": 200,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    options = loadable(tiny_model, quant, adapter=LORA)
    options["model"] |= {"weights": "random", "architecture": shape}
    model = base.load_base(options)
    assert base.describe_kernel(model)["layers"] == {kind: 14}
    read = base.load_base(loadable(tiny_model, quant, adapter=LORA))
    for ours, theirs in zip(model.model.layers.parameters(), read.model.layers.parameters(), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
    found = {name: g for name, g in lora_gradients(model, LORA).items() if "lora_A" in name}
    assert found
    assert all(torch.isfinite(g).all() and float(g.abs().sum()) > 0 for g in found.values())


def test_random_dense_weights_compute_what_the_architecture_computes(tiny_model):
    options = loadable(tiny_model, {"name": "none", "method": "dense", "bits": None})
    options["model"]["weights"] = "random"
    model = base.load_base(options)
    ids = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        logits = model(ids).logits
    reference = type(model)(model.config)
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(reference.eval()(ids).logits, logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tied as the configuration says"


def test_the_kernel_that_is_chosen_at_the_first_call_is_named(tiny_model):
    from bitsandbytes.functional import has_avx512bf16

    model = base.load_base(loadable(tiny_model, NF4))
    assert "avx512bf16" not in base.describe_kernel(model)["backend"]
    with torch.inference_mode():
        model(torch.arange(20).reshape(1, 20))
    assert ("avx512bf16" in base.describe_kernel(model)["backend"]) == has_avx512bf16()
    for_training = base.load_base(loadable(tiny_model, NF4, adapter=LORA))
    with torch.inference_mode():
        for_training(torch.arange(20).reshape(1, 20))
    assert "avx512bf16" not in base.describe_kernel(for_training)["backend"]
