"""AdamW's moments in 8 bits survive a checkpoint exactly."""

from __future__ import annotations

import functools

import bitsandbytes
import torch
from bitsandbytes.optim.optimizer import Optimizer8bit

from llm_at_home.training.callbacks.checkpoints import Checkpoints, last_checkpoint

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
