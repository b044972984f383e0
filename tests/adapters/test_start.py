"""An adapter that changes the model before it is trained stops the run."""

from __future__ import annotations

import pytest
import torch

from llm_at_home.adapters.start import PROBE_TOKENS, check_start, probe_logits

from .conftest import IDS

ADAPTER = {"name": "lora"}


def test_the_same_logits_pass_and_others_do_not():
    before = torch.randn(8, 100)
    assert check_start(ADAPTER, before, before.clone(), "float32").value == 0.0
    assert check_start(ADAPTER, before, before * 1.01, "bfloat16").value == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(RuntimeError, match="adapter=lora changes this base"):
        check_start(ADAPTER, before, before * 1.01, "float32")
    with pytest.raises(RuntimeError, match="nan"):
        check_start(ADAPTER, before, before * float("nan"), "bfloat16")


def test_probing_leaves_the_model_as_it_was(base):
    base.train()
    ids = IDS[0].tolist()
    logits = probe_logits(base, ids * 4)
    assert logits.shape == (PROBE_TOKENS, base.config.vocab_size)
    assert base.training
    assert all(p.grad is None for p in base.parameters())


def test_a_run_whose_adapter_does_not_start_as_the_identity_fails(command, tmp_path):
    words = ("adapter=lora", "adapter.r=4", "+adapter.init_lora_weights=false", "trainer.max_steps=2", "limit=8")
    done = command("train.py", *words, f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 1
    assert "changes this base before it is trained" in done.stderr + done.stdout
