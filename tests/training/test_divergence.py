"""A run that is lost stops with a record, and its last checkpoint is one from before."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from llm_at_home.training.callbacks.divergence import Diverged, Divergence

USUAL = [{"step": float(i), "loss": 1.0 + 0.01 * i, "gradient_norm": 0.5} for i in range(1, 21)]


def look(history, tmp_path, precision="32-true", **options):
    guard = Divergence(**options)
    module, trainer = SimpleNamespace(history=[]), SimpleNamespace(precision=precision, default_root_dir=str(tmp_path))
    guard.on_train_start(trainer, module)
    for step in history:
        module.history.append(step)
        guard.on_train_batch_end(trainer, module, None, None, 0)


@pytest.mark.parametrize(
    ("step", "why"),
    [
        ({"loss": math.nan}, "the loss is nan"),
        ({"loss": math.inf}, "the loss is inf"),
        ({"gradient_norm": math.inf}, "the gradient's norm is inf"),
        ({"loss": 6.2}, r"the loss jumped from 1.105 to 6.200 nats/token"),
    ],
)
def test_a_lost_step_ends_the_run(tmp_path, step, why):
    with pytest.raises(Diverged, match=f"step 21: {why}; this run saved no checkpoint"):
        look([*USUAL, {"step": 21.0, "loss": 1.0, "gradient_norm": 0.5, **step}], tmp_path)


def test_what_is_usual_goes_on(tmp_path):
    look([*USUAL, {"step": 21.0, "loss": 6.0, "gradient_norm": 40.0}], tmp_path)
    look([{"step": 1.0, "loss": 1.0}, {"step": 2.0, "loss": 9.0}], tmp_path)  # too early to know what is usual
    look([*USUAL, {"step": 21.0, "loss": 90.0}], tmp_path, spike=None)
    # The scaler of fp16 leaves such a step out.
    look([*USUAL, {"step": 21.0, "loss": 1.0, "gradient_norm": math.inf}], tmp_path, precision="16-mixed")


def test_a_run_whose_loss_is_no_number_names_its_last_good_checkpoint(command, tmp_path):
    words = ("adapter.r=4", "limit=8", "trainer.max_steps=6", "callbacks.accumulation.steps=1")
    lost = ("optimizer.lr=1e30", "callbacks.clipping.max_norm=1e30", "callbacks.checkpoints.every_n_steps=1")
    done = command("train.py", *words, *lost, f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 1
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["status"] == "failed"
    assert record["error"]["type"] == "Diverged", record["error"]
    saved = [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(saved) == 1
    assert f"{saved[0]}. Lower optimizer.lr" in record["error"]["message"]
    assert record["counts"]["optimizer_steps"] == int(saved[0].removeprefix("step_")) + 1
    state = torch.load(tmp_path / "run" / "checkpoints" / saved[0] / "trainer.ckpt", weights_only=False)
    assert state["global_step"] == int(saved[0].removeprefix("step_"))
