"""AdamW's moments in 8 bits and on the host survive a checkpoint exactly, and the host's are AdamW's."""

from __future__ import annotations

import functools

import bitsandbytes
import pytest
import torch
from bitsandbytes.optim.optimizer import Optimizer8bit

from llm_at_home.training.callbacks.checkpoints import Checkpoints, last_checkpoint
from llm_at_home.training.callbacks.clipping import GradientClipping
from llm_at_home.training.host_optimizer import HostAdamW

ADAMW = functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1, fused=True)
HOST_ADAMW = functools.partial(HostAdamW, lr=1e-3, weight_decay=0.1)
HALVING = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
ADAMW_8BIT = functools.partial(bitsandbytes.optim.AdamW8bit, lr=1e-3, weight_decay=0.0)


def test_a_run_with_moments_in_8_bits_resumes_exactly(fit, tmp_path):
    straight = fit(2, 1, steps=5, optimizer=ADAMW_8BIT, folder=tmp_path / "straight")
    saving = [Checkpoints(every_n_steps=3)]
    fit(2, 1, steps=3, optimizer=ADAMW_8BIT, callbacks=saving, folder=tmp_path / "stopped")
    checkpoint = last_checkpoint(tmp_path / "stopped")
    saved = torch.load(checkpoint, weights_only=False)["optimizer_states"][0]["state"]
    # bitsandbytes keeps small tensors in 32 bits: the test would say nothing if all were.
    wrapped = [moments[Optimizer8bit._FSDP_WRAPPED_QUANT_STATE_KEY] for moments in saved.values()]
    assert torch.uint8 in {moments["state1"].dtype for moments in wrapped}
    resumed = fit(2, 1, steps=5, optimizer=ADAMW_8BIT, resume=checkpoint, folder=tmp_path / "resumed")
    assert resumed.history == straight.history
    for (name, a), (_, b) in zip(resumed.model.named_parameters(), straight.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_host_makes_adamw_s_steps_and_resumes_exactly(fit, tmp_path):
    options = {"lengths": (5, 9, 12, 7), "scheduler": HALVING}
    wanted = fit(
        2, 1, steps=5, optimizer=ADAMW, callbacks=[GradientClipping(0.3)], folder=tmp_path / "adamw", **options
    )
    options["optimizer"] = HOST_ADAMW
    host = fit(2, 1, steps=5, callbacks=[GradientClipping(0.3)], folder=tmp_path / "host", **options)
    assert host.history == wanted.history
    for (name, a), (_, b) in zip(host.model.named_parameters(), wanted.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    saving = [GradientClipping(0.3), Checkpoints(every_n_steps=3)]
    fit(2, 1, steps=3, callbacks=saving, folder=tmp_path / "stopped", **options)
    checkpoint = last_checkpoint(tmp_path / "stopped")
    resumed = fit(
        2, 1, steps=5, callbacks=[GradientClipping(0.3)], resume=checkpoint, folder=tmp_path / "on", **options
    )
    assert resumed.history == wanted.history
    for (name, a), (_, b) in zip(resumed.model.named_parameters(), wanted.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_updates_that_16_bits_cannot_hold_are_kept_on_the_host():
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = HostAdamW([weight], lr=1e-3)
    for _ in range(6):  # each too small for bfloat16 beside 1, whose next smaller number is 0.4 % below
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert optimizer.state_dict()["host_weights"][0].tolist() == pytest.approx([0.994] * 8, rel=1e-4)
    assert weight.tolist() == [0.9921875] * 8


def test_a_tensor_without_a_gradient_waits_and_no_gradient_stays_on_the_host():
    trained, waiting = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(5))
    optimizer = HostAdamW([{"params": [trained]}, {"params": [waiting], "lr": 1.0}], lr=1e-3)
    trained.grad = torch.ones(3)
    optimizer.step()
    assert trained.tolist() == pytest.approx([0.999] * 3)
    assert waiting.tolist() == [1.0] * 5
    waiting.grad = torch.ones(5)
    trained.grad = None
    optimizer.step()
    assert waiting.tolist() == pytest.approx([0.0] * 5, abs=1e-6)
    hosts = [p for inner in optimizer._hosts for group in inner.param_groups for p in group["params"]]
    assert [host.grad for host in hosts] == [None, None]
