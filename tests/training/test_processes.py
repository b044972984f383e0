"""A run over two processes makes the steps of one: the loss is averaged over the tokens of both."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from llm_at_home.errors import Refusal
from llm_at_home.tasks import resolve
from llm_at_home.training.callbacks.checkpoints import Checkpoints
from llm_at_home.training.data import ChatDataModule


def test_processes_share_the_batches_of_a_pass(conversations):
    rows = conversations((3, 4, 5, 6, 7, 8, 9))
    whole = [batch["input_ids"].tolist() for batch in ChatDataModule(rows, 1, 0, seed=3).train_dataloader()]
    shares = []
    for rank in range(2):
        loader = ChatDataModule(rows, 1, 0, seed=3).train_dataloader()
        loader.share(rank, 2)
        shares.append(list(loader))
        assert len(shares[rank]) == len(loader) == 4
    taken = [batch["input_ids"].tolist() for pair in zip(*shares, strict=True) for batch in pair]
    assert taken[:7] == whole
    assert (shares[1][-1]["labels"] == -100).all()  # the seventh had no partner


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["trainer.devices=2"], "use trainer=ddp trainer.devices=2"),
        (["trainer.devices=0"], "give at least 1"),
        (["trainer.strategy=fsdp"], "use trainer=ddp, and for less memory"),
        (["trainer=ddp", "adapter=adalora"], "use trainer=default"),
        (["trainer=ddp", "adapter=none"], "use trainer=default"),
        (["trainer=ddp", "resume=some/run"], "resume with trainer=default"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(resolved, words, why):
    with pytest.raises(Refusal, match=why):
        resolve.check("train", resolved(words))


def test_every_process_asks_for_a_checkpoint_once(tmp_path):
    """A process that returned early would leave the others waiting for it."""
    asked = []
    trainer = SimpleNamespace(
        default_root_dir=str(tmp_path), global_step=4, world_size=2, is_global_zero=False, save_checkpoint=asked.append
    )
    module = torch.nn.Linear(2, 2)
    checkpoints = Checkpoints()
    folders = [checkpoints.save(trainer, module), checkpoints.save(trainer, module)]
    assert folders == [tmp_path / "checkpoints" / "step_000004"] * 2
    (tmp_path / "checkpoints" / "step_000005").mkdir(parents=True)  # which the first process may have made already
    trainer.global_step = 5
    checkpoints.save(trainer, module)
    assert len(asked) == 2


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(command, tmp_path):
    words = ("adapter.r=4", "limit=7", "trainer.max_steps=6", "scheduler=linear", "optimizer.lr=1e-2", "rerun=true")
    words += ("callbacks.checkpoints.every_n_steps=4", "callbacks.power.idle_seconds=0")
    one, two = tmp_path / "one", tmp_path / "two"
    # Seven conversations: a pass leaves the second process without its last one.
    done = command("train.py", *words, "callbacks.accumulation.steps=4", f"hydra.run.dir={one}")
    assert done.returncode == 0, done.stderr
    both = ("trainer=ddp", "callbacks.accumulation.steps=2")
    done = command("train.py", *words, *both, f"hydra.run.dir={two}", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr + (two / "job.log").read_text()
    steps = []
    for folder in (one, two):
        with (folder / "metrics.csv").open() as file:
            steps.append(list(csv.DictReader(file)))
    assert len(steps[1]) == 6
    for key in ("step", "loss", "tokens", "gradient_norm", "lr"):
        wanted, found = ([float(step[key]) for step in run] for run in steps)
        assert found == pytest.approx(wanted, rel=1e-4), key
    record = json.loads((two / "record.json").read_text())
    assert record["status"] == "ok"
    assert any("the first of 2 processes" in note for note in record["notes"])
    assert [path.name for path in (two / "checkpoints").iterdir()] == ["step_000004"]
    saved = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two)]
    moved = sum(float(tensor.square().sum()) for name, tensor in saved[0].items() if "lora_B" in name)
    apart = sum(float((saved[0][name] - tensor).square().sum()) for name, tensor in saved[1].items())
    assert apart < 1e-4 * moved
