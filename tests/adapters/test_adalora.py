"""AdaLoRA's ranks and penalty, computed for many matrices at once, are PEFT's, step by step."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import get_peft_model_state_dict
from peft.tuners.adalora.layer import RankAllocator

from llm_at_home.adapters import adalora
from llm_at_home.adapters.attach import prepare_for_training

from .conftest import IDS, gradients, randomize

STEPS = 30
ADALORA = {
    **{"trains": "adapter", "task_type": "CAUSAL_LM", "name": "adalora", "_target_": "peft.AdaLoraConfig"},
    **{"init_r": 6, "target_r": 3, "deltaT": 2, "target_modules": "all-linear"},
    "schedule": {"initial": 0.1, "final": 0.3},
}
SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


@pytest.fixture(params=[adalora.AT_ONCE, 1000, 1], ids=["at_once", "in_parts", "one_by_one"])
def groups(monkeypatch, request):
    monkeypatch.setattr(adalora, "AT_ONCE", request.param)
    return request.param


def adapted(base, implementation="factored", **options):
    model = prepare_for_training(base, {**ADALORA, **options, "implementation": implementation}, steps=STEPS)
    randomize(model)
    return model


def triplets(model):
    return adalora.Triplets(model.base_model.model, "default")


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_the_allocator_is_ours_unless_peft_s_is_asked_for(make_base):
    assert type(adapted(make_base(), "peft").base_model.rankallocator) is RankAllocator
    assert type(adapted(make_base()).base_model.rankallocator) is adalora.BatchedRankAllocator


def test_scores_patterns_and_what_is_masked_are_peft_s_at_every_step(make_base, groups):
    wanted, found = adapted(make_base(), "peft"), adapted(make_base())
    assert len(triplets(found).parameters) == 2 * 7 * 3
    assert len({p.shape for name, p in triplets(found).parameters.items() if "lora_A" in name}) == 2
    generator = torch.Generator().manual_seed(1)
    patterns = []
    for step in range(1, STEPS + 1):
        for (name, ours), theirs in zip(trained(found).items(), trained(wanted).values(), strict=True):
            theirs.grad = torch.randn(theirs.shape, generator=generator) * 0.1
            ours.grad = theirs.grad.clone()
            with torch.no_grad():
                theirs.sub_(theirs.grad)
                ours.sub_(ours.grad)
            # Random numbers of unlike sizes, so that the matrices are of unlike importance.
            theirs.grad *= 1 + len(name) % 3
            ours.grad *= 1 + len(name) % 3
        wanted.base_model.update_and_allocate(step)
        found.base_model.update_and_allocate(step)
        pattern = wanted.peft_config["default"].rank_pattern
        assert found.peft_config["default"].rank_pattern == pattern
        patterns.append(pattern)
        for kind in SCORES:
            ours, theirs = (getattr(model.base_model.rankallocator, kind) for model in (found, wanted))
            assert list(ours) == list(theirs)
            for name, score in theirs.items():
                torch.testing.assert_close(ours[name], score, rtol=1e-5, atol=1e-9)
        for (name, ours), theirs in zip(trained(found).items(), trained(wanted).values(), strict=True):
            assert torch.equal(ours, theirs), name
        if step == STEPS - 3:
            # Saving takes the adapter's name out of the pattern's names.
            saved = [get_peft_model_state_dict(model) for model in (found, wanted)]
            assert all(torch.equal(saved[0][name], value) for name, value in saved[1].items())
            assert not any("default" in name for name in found.peft_config["default"].rank_pattern)
    assert patterns[2] is None
    assert [b is not a for a, b in itertools.pairwise(patterns[4:10])] == [True, False, True, False, True]
    ranks = {sum(kept) for kept in patterns[-1].values()}
    assert len(ranks) > 1
    assert sum(sum(kept) for kept in patterns[-1].values()) == 14 * 3


def test_another_pattern_masks_what_it_says(make_base):
    wanted, found = adapted(make_base(), "peft"), adapted(make_base())
    names = triplets(found).names["lora_E"]
    for lost in (0, 5):
        pattern = {name: [row != lost for row in range(6)] for name in names}
        for model in (wanted, found):
            model.base_model.rankallocator.mask_using_rank_pattern(model.base_model.model, pattern)
        for (name, ours), theirs in zip(trained(found).items(), trained(wanted).values(), strict=True):
            assert torch.equal(ours, theirs), name
            assert "lora_E" not in name or not ours[lost].any()


def test_scores_that_were_put_back_are_gone_on_with(make_base):
    straight, resumed = adapted(make_base()), adapted(make_base())
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 11):
        for model in (straight, resumed):
            for p in trained(model).values():
                p.grad = torch.randn(p.shape, generator=generator)
        if step == 6:
            for kind in SCORES:
                kept = getattr(straight.base_model.rankallocator, kind)
                setattr(resumed.base_model.rankallocator, kind, {name: score.clone() for name, score in kept.items()})
        if step >= 6:
            for ours, theirs in zip(trained(resumed).values(), trained(straight).values(), strict=True):
                ours.grad = theirs.grad.clone()
                ours.data.copy_(theirs.data)
            resumed.base_model.update_and_allocate(step)
        straight.base_model.update_and_allocate(step)
    pattern = straight.peft_config["default"].rank_pattern
    assert pattern
    assert resumed.peft_config["default"].rank_pattern == pattern


def test_an_adapter_of_unlike_ranks_is_gone_on_with(make_base, tmp_path):
    model = adapted(make_base())
    names = triplets(model).names["lora_E"]
    pattern = {name: [bool((number + row) % 3) or row == 0 for row in range(6)] for number, name in enumerate(names)}
    assert len({sum(kept) for kept in pattern.values()}) > 1
    model.peft_config["default"].rank_pattern = pattern
    model.save_pretrained(tmp_path)
    ends = []
    for implementation in ("peft", "factored"):
        again = prepare_for_training(make_base(), {**ADALORA, "implementation": implementation}, saved=tmp_path)
        generator = torch.Generator().manual_seed(1)
        for step in range(1, STEPS - 8):
            for p in trained(again).values():
                p.grad = torch.randn(p.shape, generator=generator)
            again.base_model.update_and_allocate(step)
        ends.append((again.peft_config["default"].rank_pattern, trained(again)))
    assert ends[0][0] == ends[1][0]
    assert sum(sum(kept) for kept in ends[0][0].values()) < sum(sum(kept) for kept in pattern.values())
    assert all(torch.equal(ends[1][1][name], value) for name, value in ends[0][1].items())


def test_the_penalty_and_its_gradient_are_peft_s(make_base, groups):
    model = adapted(make_base().double(), orth_reg_weight=0.7)
    assert {p.dtype for p in trained(model).values()} == {torch.float64}
    losses, slopes = [], []
    for weight in (0.7, 0.0):
        model.peft_config["default"].orth_reg_weight = weight
        # With labels PEFT adds it to the loss.
        loss = model(input_ids=IDS, labels=IDS).loss
        slopes.append(torch.autograd.grad(loss, list(trained(model).values())))
        losses.append(loss.item())
    before = {name: slope.clone() for name, slope in gradients(model).items()}
    penalty = triplets(model).penalize(0.7)
    assert not penalty.requires_grad
    assert float(penalty) == pytest.approx(losses[0] - losses[1], rel=1e-5)  # transformers' loss is in float32
    for (name, p), with_penalty, without in zip(trained(model).items(), *slopes, strict=True):
        torch.testing.assert_close(p.grad - before[name], with_penalty - without, rtol=1e-6, atol=1e-12, msg=name)
        assert ("lora_E" in name) == torch.equal(p.grad, before[name])


def test_the_penalty_s_gradient_in_float32_is_autograd_s(make_base):
    model = adapted(make_base())
    triplets(model).penalize(0.5)  # where there is no gradient yet
    parts = {name: p for name, p in trained(model).items() if "lora_E" not in name}
    norms = []
    for name, p in parts.items():
        product = p @ p.T if "lora_A" in name else p.T @ p
        norms.append(torch.linalg.norm(product - torch.eye(len(product))))
    wanted = torch.autograd.grad(0.5 * torch.stack(norms).mean(), list(parts.values()))
    for (name, p), slope in zip(parts.items(), wanted, strict=True):
        torch.testing.assert_close(p.grad, slope, rtol=1e-4, atol=1e-7, msg=name)


def test_orthonormal_directions_have_no_gradient(make_base):
    model = adapted(make_base())
    with torch.no_grad():
        for p in trained(model).values():
            p.copy_(torch.eye(*p.shape))
    assert float(triplets(model).penalize(0.5)) == 0
    assert all(p.grad is None or not p.grad.any() for p in trained(model).values())
