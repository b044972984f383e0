"""Bottleneck adapters: the identity at the start, saved, loaded and switched as PEFT's own are, and never merged."""

from __future__ import annotations

import pytest
import torch

from llm_at_home.adapters.attach import attach_saved, prepare_for_training, trainable_parameters
from llm_at_home.adapters.bottleneck import BottleneckConfig, BottleneckLayer

from .conftest import IDS, randomize

ADAPTER = {
    "name": "bottleneck",
    "trains": "adapter",
    "_target_": "llm_at_home.adapters.bottleneck.BottleneckConfig",
    "task_type": "CAUSAL_LM",
    "bottleneck_size": 8,
}


def test_it_starts_as_the_identity_after_both_blocks(base):
    with torch.no_grad():
        before = base(IDS).logits
    model = prepare_for_training(base, ADAPTER)
    torch.testing.assert_close(model(IDS).logits, before)
    names = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, BottleneckLayer)}
    assert names == {"o_proj", "down_proj"}
    # down 64 x 8 + 8, up 8 x 64 + 64, after both blocks of two layers
    assert trainable_parameters(model) == 4 * (64 * 8 + 8 + 8 * 64 + 64)


def test_it_is_the_network_of_the_paper(base):
    model = prepare_for_training(base, ADAPTER)
    randomize(model)
    layer = next(m for m in model.modules() if isinstance(m, BottleneckLayer))
    x = torch.randn(2, 64)
    h = layer.base_layer(x)
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    inner = torch.nn.functional.gelu(h @ down.weight.T + down.bias)
    torch.testing.assert_close(layer(x), h + inner @ up.weight.T + up.bias)


def test_it_is_saved_loaded_and_switched(make_base, tmp_path):
    logits = {}
    for seed in (1, 2):
        model = prepare_for_training(make_base(), ADAPTER)
        randomize(model, seed)
        model.save_pretrained(tmp_path / str(seed))
        with torch.no_grad():
            logits[seed] = model.eval()(IDS).logits
    model = attach_saved(make_base(), tmp_path / "1")
    model.load_adapter(str(tmp_path / "2"), "other")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits[1])
        model.set_adapter("other")
        torch.testing.assert_close(model(IDS).logits, logits[2])
        with model.disable_adapter():
            torch.testing.assert_close(model(IDS).logits, make_base()(IDS).logits)


def test_it_is_not_merged(base):
    model = prepare_for_training(base, ADAPTER)
    with pytest.raises(ValueError, match="beside the base"):
        model.merge_and_unload()


@pytest.mark.parametrize(("options", "hint"), [({"bottleneck_size": 0}, "at least 1"), ({"activation": "x"}, "gelu")])
def test_settings_that_do_not_exist_are_refused(options, hint):
    with pytest.raises(ValueError, match=hint):
        BottleneckConfig(**options)
