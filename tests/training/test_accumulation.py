"""A schedule of micro-batches counts optimizer steps, and each window's loss is the mean over its own tokens."""

from __future__ import annotations

import json

import pytest
import torch
from hydra.utils import instantiate
from transformers import AutoModelForCausalLM

from llm_at_home.errors import Refusal
from llm_at_home.tasks import resolve
from llm_at_home.tasks.checks import resume
from llm_at_home.training.accumulation_schedule import accumulation_schedule
from llm_at_home.training.callbacks.checkpoints import Checkpoints, last_checkpoint
from llm_at_home.training.data import ChatDataModule

LENGTHS = (5, 9, 12, 7, 10, 6, 11, 8)
# By optimizer step: windows of 3, 2 and 2 micro-batches and the one left of the pass, then of 1 in the next.
SCHEDULE = {0: 3, 1: 2, 4: 1}
WINDOWS = ((0, 3), (3, 5), (5, 7), (7, 8), (8, 9), (9, 10))


def test_each_window_is_averaged_over_its_own_tokens(fit, conversations, short_vocabulary):
    module = fit(1, SCHEDULE, steps=len(WINDOWS), lengths=LENGTHS)
    model = AutoModelForCausalLM.from_pretrained(short_vocabulary, dtype=torch.float32).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loader = ChatDataModule(conversations(LENGTHS), 1, 0, seed=0).train_dataloader()
    batches = [batch for _ in range(2) for batch in loader]
    losses, tokens = [], []
    for first, end in WINDOWS:
        window = batches[first:end]
        tokens.append(sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in window))
        losses.append(0.0)
        optimizer.zero_grad()
        for batch in window:
            loss = model(**batch, num_items_in_batch=torch.tensor(tokens[-1])).loss  # transformers' own average
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
    assert [step["tokens"] for step in module.history] == tokens
    assert [step["loss"] for step in module.history] == pytest.approx(losses, rel=1e-5)
    for (name, a), (_, b) in zip(module.model.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-6, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("group_by_length", [False, True])
def test_a_run_resumed_between_two_numbers_goes_on_exactly(fit, tmp_path, group_by_length):
    options = {"lengths": LENGTHS, "group_by_length": group_by_length}
    straight = fit(1, SCHEDULE, steps=6, folder=tmp_path / "straight", **options)
    fit(1, SCHEDULE, steps=2, callbacks=[Checkpoints(every_n_steps=2)], folder=tmp_path / "stopped", **options)
    checkpoint = last_checkpoint(tmp_path / "stopped")
    resumed = fit(1, SCHEDULE, steps=6, resume=checkpoint, callbacks=[Checkpoints()], folder=tmp_path / "on", **options)
    assert resumed.history == straight.history
    for a, b in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_a_schedule_may_be():
    assert accumulation_schedule(8) == {0: 8}
    assert accumulation_schedule({"100": 4, "0": 8}) == {0: 8, 100: 4}  # as a record keeps it
    for steps, why in (
        (0, "at least 1"),
        ({0: 8, 9: 0}, "at least 1"),
        ({5: 8}, "give step 0"),
        ("many", "no schedule"),
        (2.5, "no schedule"),
        (None, "no schedule"),
        ({}, "give step 0"),
    ):
        with pytest.raises(Refusal, match=why):
            accumulation_schedule(steps)


def test_a_schedule_comes_from_the_command_line_and_back_from_a_record(resolved):
    config = resolved(["callbacks.accumulation.steps={0: 4, 100: 2}"])
    resolve.check("train", config)
    kept = json.loads(json.dumps(config))
    assert instantiate(kept["callbacks"]["accumulation"]).schedule == {0: 4, 100: 2}
    resume._check_same(config, kept, "some/run")
    kept["callbacks"]["accumulation"]["steps"] = 4
    with pytest.raises(Refusal, match=r"was run with callbacks\.accumulation.steps=4"):
        resume._check_same(config, kept, "some/run")
