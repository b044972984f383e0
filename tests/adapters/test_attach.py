"""Adapters on a base: made, saved, found again, and refused where they do not fit."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llm_at_home.adapters.attach import (
    adapter_folder,
    add_saved,
    attach_saved,
    prepare_for_training,
    trainable_parameters,
)
from llm_at_home.errors import Refusal

LORA = {
    "name": "lora",
    "trains": "adapter",
    "_target_": "peft.LoraConfig",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "target_modules": "all-linear",
}
IDS = torch.arange(50, 80).reshape(1, 30)


def test_a_fresh_lora_is_the_identity_and_trains_alone(base):
    with torch.no_grad():
        before = base(IDS).logits
    model = prepare_for_training(base, LORA)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, before)
    # rank times (inputs + outputs) of the seven linear layers of each of two blocks
    widths = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)
    assert trainable_parameters(model) == 2 * 4 * widths
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_a_saved_adapter_comes_back_with_the_same_logits(base, tiny_model, tmp_path):
    model = prepare_for_training(base, LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    again = attach_saved(fresh, tmp_path)  # the run's folder, which holds adapter/
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model.eval()(IDS).logits)
    assert adapter_folder(tmp_path) == adapter_folder(tmp_path / "adapter")
    further = prepare_for_training(AutoModelForCausalLM.from_pretrained(tiny_model), LORA, saved=tmp_path)
    assert trainable_parameters(further) == trainable_parameters(model)


def test_full_trains_everything_and_none_nothing(base):
    assert trainable_parameters(prepare_for_training(base, {"name": "none", "trains": "nothing"})) == 0
    everything = prepare_for_training(base, {"name": "full", "trains": "all"})
    assert trainable_parameters(everything) == sum(p.numel() for p in base.parameters())


def test_an_adapter_of_another_model_is_refused(base, tmp_path):
    shape = base.config.to_dict()
    prepare_for_training(base, LORA).save_pretrained(tmp_path / "adapter")
    wider = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    with pytest.raises(Refusal, match="does not fit this model"):
        attach_saved(LlamaForCausalLM(wider), tmp_path)
    deeper = LlamaForCausalLM(LlamaConfig(**shape | {"num_hidden_layers": 3}))
    fresh = prepare_for_training(copy.deepcopy(deeper), LORA)
    for load in (attach_saved, lambda model, path: prepare_for_training(model, LORA, saved=path)):
        with pytest.raises(Refusal, match="lacks weights for layers of this model"):
            load(copy.deepcopy(deeper), tmp_path)
    with pytest.raises(Refusal, match="lacks weights for layers of this model"):
        add_saved(fresh, tmp_path, "other")
    with pytest.raises(Refusal, match=r"adapter_config\.json"):
        adapter_folder(tmp_path / "elsewhere")
