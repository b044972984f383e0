"""Adapters that cannot be trained on a base are refused before anything loads, and what is refused does fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from llm_at_home.adapters.compatibility import REFUSED, base_kind
from llm_at_home.errors import Refusal
from llm_at_home.tasks import resolve

CONF = Path(__file__).resolve().parents[2] / "conf"


def checked(*words):
    overrides = ["gpu=cpu", "logger=none", *words]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = resolve.resolve("train", compose("train", overrides), overrides)
    resolve.check("train", config)
    return config


@pytest.mark.parametrize(
    ("quant", "adapter", "hint"),
    [
        ("int8", ["adapter=dora"], "adapter=lora"),
        ("gptq", ["adapter=dora"], "adapter=lora"),
        ("awq", ["adapter=dora"], "adapter=lora"),
        ("nf4", ["adapter=lokr", "adapter.implementation=peft"], "adapter.implementation=factored"),
        ("int8", ["adapter=loha", "adapter.implementation=peft"], "adapter.implementation=factored"),
        ("none", ["adapter=lokr", "adapter.implementation=quick"], "factored or peft"),
        ("rtn", ["adapter=lora"], "quant=nf4"),
        ("nf4", ["adapter=lora_pissa"], "quant=none"),
        ("int8", ["adapter=lora_loftq"], "quant=nf4 or quant=nf4_nested"),
        ("nf4", ["adapter=lora_loftq", "model.weights=random"], "adapter=lora"),
        ("none", ["adapter=adalora", "trainer.max_steps=3"], "more steps"),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_change(quant, adapter, hint):
    with pytest.raises(Refusal, match=hint) as refusal:
        checked(f"quant={quant}", *adapter)
    assert "\n" not in str(refusal.value)


SOME_BASES = ("full", "dora", "lora_pissa", "lora_loftq")
ADAPTERS = sorted(path.stem for path in (CONF / "adapter").glob("*.yaml") if path.stem not in SOME_BASES)


@pytest.mark.parametrize("quant", ["none", "int8", "nf4", "nf4_nested", "fp4", "gptq", "awq", "int8_torchao"])
def test_everything_else_is_let_through(quant):
    for adapter in ADAPTERS:
        checked(f"quant={quant}", f"adapter={adapter}")


def test_each_kind_of_base_in_the_table_exists():
    kinds = set()
    for choice in ("int8", "nf4", "fp4", "gptq", "awq"):
        kinds.add(base_kind(checked(f"quant={choice}", "adapter=lora")["quant"]))
    assert set(REFUSED) <= kinds


def test_peft_s_own_lokr_does_fail_on_four_bits(tiny_model):
    """The refusal is needed: what it keeps a person from does end in an error."""
    from llm_at_home.adapters.attach import prepare_for_training
    from llm_at_home.quantization.base import load_base

    words = ["quant=nf4", "model=custom", f"model.source={tiny_model}", "adapter=lokr", "adapter.r=4"]
    config = checked(*words)
    ids = {"input_ids": torch.arange(20).reshape(1, 20)}
    ours = prepare_for_training(load_base(config), config["adapter"])
    assert ours(**ids).logits.isfinite().all()
    with pytest.raises(RuntimeError, match="shape"):
        prepare_for_training(load_base(config), {**config["adapter"], "implementation": "peft"})(**ids)
