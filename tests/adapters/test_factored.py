"""LoKr and LoHa computed with their factors are PEFT's: values, gradients, checkpoints; and no product is ever made."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.loha.layer import Linear as PeftLoHa
from peft.tuners.lokr.layer import Linear as PeftLoKr
from torch import nn

from llm_at_home.adapters.attach import attach_saved, prepare_for_training
from llm_at_home.adapters.layer import output_dropout
from llm_at_home.adapters.loha import FactoredLoHaLinear, _product
from llm_at_home.adapters.lokr import FactoredLoKrLinear, equal_rank

from .conftest import IDS, gradients, randomize

COMMON = {"trains": "adapter", "task_type": "CAUSAL_LM", "target_modules": "all-linear"}
LOKR = {**COMMON, "name": "lokr", "_target_": "peft.LoKrConfig", "alpha": 8}
LOHA = {**COMMON, "name": "loha", "_target_": "peft.LoHaConfig", "alpha": 8}
CASES = {
    "factor 2, second factor decomposed": {**LOKR, "r": 4, "decompose_factor": 2},
    "near the square root": {**LOKR, "r": 2},
    "both factors decomposed": {**LOKR, "r": 2, "decompose_both": True},
    "second factor whole": {**LOKR, "r": 64, "decompose_factor": 8},
    "small second factor, mixed after it": {**LOKR, "r": 64, "decompose_factor": 2},
    "started as LyCORIS does": {**LOKR, "r": 4, "init_weights": "lycoris"},
    "loha, its factors smaller": {**LOHA, "r": 3},
    "loha, the matrix smaller": {**LOHA, "r": 16},
}


@pytest.mark.parametrize("adapter", CASES.values(), ids=CASES.keys())
def test_values_gradients_and_checkpoints_are_peft_s(make_base, tmp_path, adapter):
    ours = prepare_for_training(make_base(), adapter)
    theirs = prepare_for_training(make_base(), {**adapter, "implementation": "peft"})
    layers = (FactoredLoKrLinear, FactoredLoHaLinear), (PeftLoKr, PeftLoHa)
    assert sum(isinstance(m, layers[0]) for m in ours.modules()) == 14
    assert sum(isinstance(m, layers[1]) for m in theirs.modules()) == 14
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    randomize(ours)
    randomize(theirs)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)
    wanted = gradients(theirs)
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-7, msg=name)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = attach_saved(make_base(), tmp_path / "theirs")
    assert any(isinstance(m, layers[0]) for m in loaded.modules())
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, theirs.eval()(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", [CASES["near the square root"], CASES["loha, its factors smaller"]])
def test_merging_gives_the_same_model(make_base, adapter):
    model = prepare_for_training(make_base(), adapter).eval()
    randomize(model)
    with torch.no_grad():
        before = model(IDS).logits
        torch.testing.assert_close(model.merge_and_unload()(IDS).logits, before, rtol=1e-4, atol=1e-5)


def saved_for_backward(run):
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sizes


@pytest.mark.parametrize("adapter", [{**LOKR, "r": 4, "decompose_factor": 2}, {**LOHA, "r": 2}])
def test_nothing_of_the_size_of_a_weight_is_kept(adapter):
    from peft import LoHaConfig, LoKrConfig

    kind, config = {
        "lokr": (FactoredLoKrLinear, LoKrConfig(r=4, alpha=8, decompose_factor=2)),
        "loha": (FactoredLoHaLinear, LoHaConfig(r=2, alpha=8)),
    }[adapter["name"]]
    width = 512
    layer = kind(nn.Linear(width, width).requires_grad_(False), "default", config, r=config.r, alpha=8)
    theirs = {"lokr": PeftLoKr, "loha": PeftLoHa}[adapter["name"]](
        nn.Linear(width, width).requires_grad_(False), "default", config, r=config.r, alpha=8
    )
    x = torch.randn(3, width, requires_grad=True)
    own = [n for n in saved_for_backward(lambda: layer._get_delta_activations("default", x))]
    assert max(own) < width**2 / 8
    assert max(saved_for_backward(lambda: theirs._get_delta_activations("default", x))) >= width**2


class Packed(nn.Module):
    """A linear layer as GPTQModel's are: no subclass of nn.Linear, and no weight to look at."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("qweight", torch.zeros(inputs // 8, outputs, dtype=torch.int32))

    def forward(self, x):
        return torch.zeros(*x.shape[:-1], self.out_features)


@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_a_base_whose_weight_cannot_be_read_will_do_and_is_not_merged_into(kind):
    from peft import LoHaConfig, LoKrConfig

    made = {"lokr": (FactoredLoKrLinear, LoKrConfig(r=2, alpha=2)), "loha": (FactoredLoHaLinear, LoHaConfig(r=2))}
    cls, config = made[kind]
    layer = cls(Packed(32, 48), "default", config, r=2, alpha=2)
    randomize(layer)
    x = torch.randn(5, 32)
    torch.testing.assert_close(layer(x), x @ layer.get_delta_weight("default").T, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="quant=none"):
        layer.merge()


def test_rank_dropout_takes_whole_outputs_away():
    torch.manual_seed(0)
    mask = output_dropout(1000, 0.3, rescale=True, like=torch.zeros(1))
    assert 0.6 < float((mask > 0).float().mean()) < 0.8
    assert float(mask.mean()) == pytest.approx(1.0)
    assert set(output_dropout(1000, 0.3, rescale=False, like=torch.zeros(1)).tolist()) == {0.0, 1.0}


def test_the_two_ways_of_loha_are_one_function():
    a1, a2, b1, b2 = torch.randn(40, 3), torch.randn(40, 3), torch.randn(3, 50), torch.randn(3, 50)
    x = torch.randn(7, 50)
    whole = x @ ((a1 @ b1) * (a2 @ b2)).T
    assert 9 * 90 < 40 * 50  # so that the factors are taken
    torch.testing.assert_close(_product(x, a1, b1, a2, b2), whole, rtol=1e-4, atol=1e-4)


def test_equal_rank_counts_parameters():
    rank = equal_rank(64, 4096, 11008)
    lora = 64 * (4096 + 11008)
    lokr = 4 + rank * (4096 + 11008) // 2
    assert lora - (4096 + 11008) / 2 < lokr <= lora


def test_an_unknown_implementation_is_refused(base):
    with pytest.raises(ValueError, match="factored, peft"):
        prepare_for_training(base, {**LOKR, "implementation": "quick"})
