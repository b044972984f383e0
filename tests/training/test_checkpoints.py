"""Which checkpoints a run folder holds: those of the run that is in it, whatever another left there before."""

from __future__ import annotations

import torch

from llm_at_home.training.callbacks.checkpoints import Checkpoints, last_checkpoint


def kept(folder):
    return [path.name for path in sorted((folder / "checkpoints").iterdir())]


def test_an_earlier_run_s_checkpoints_are_put_aside(fit, tmp_path):
    fit(1, 1, steps=6, callbacks=[Checkpoints(every_n_steps=3, keep=2)])
    earlier = torch.load(last_checkpoint(tmp_path), weights_only=False)["history"]
    fit(2, 1, steps=3, callbacks=[Checkpoints(every_n_steps=3)])
    assert kept(tmp_path) == ["step_000003"]
    state = torch.load(last_checkpoint(tmp_path), weights_only=False)
    assert state["history"][0]["tokens"] != earlier[0]["tokens"], "that of the earlier run is still there"
    assert sorted(path.name for path in (tmp_path / "checkpoints.previous").iterdir()) == ["step_000003", "step_000006"]


def test_a_run_resumed_in_another_s_folder_keeps_its_own(fit, tmp_path):
    first, other = tmp_path / "first", tmp_path / "other"
    fit(1, 1, steps=2, callbacks=[Checkpoints(every_n_steps=2)], folder=first)
    fit(1, 1, steps=6, callbacks=[Checkpoints(every_n_steps=3, keep=2)], folder=other)
    resume = str(last_checkpoint(first))
    fit(1, 1, steps=4, callbacks=[Checkpoints(every_n_steps=4)], folder=other, resume=resume)
    assert kept(other) == ["step_000004"]
