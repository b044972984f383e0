"""The loss is averaged over the tokens of the effective batch, and clipping acts on the accumulated gradient."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_at_home.models.chat import IGNORED, Encoded
from llm_at_home.training.callbacks.clipping import GradientClipping
from llm_at_home.training.callbacks.throughput import Throughput
from llm_at_home.training.data import ChatDataModule, pack


@pytest.mark.parametrize(
    ("batch_size", "packing", "loss_tokens"), [(1, False, None), (1, False, 8), (2, True, 8), (4, True, None)]
)
def test_micro_batches_do_not_change_the_update(fit, batch_size, packing, loss_tokens):
    lengths = (5, 20, 12, 17, 7, 9, 32, 3)  # which a mean of means would weigh otherwise
    whole = fit(batch_size=8, accumulate=1, steps=1, lengths=lengths)
    split = fit(batch_size, 8 // batch_size, steps=1, lengths=lengths, packing=packing, loss_tokens=loss_tokens)
    for (name, a), (_, b) in zip(whole.model.named_parameters(), split.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    assert [s["loss"] for s in whole.history] == pytest.approx([s["loss"] for s in split.history], rel=1e-5)
    assert [s["tokens"] for s in whole.history] == [s["tokens"] for s in split.history]


@pytest.mark.parametrize("loss_tokens", [None, 8])
def test_packed_conversations_do_not_see_each_other(fit, loss_tokens):
    """The update is that of the padded batch, with no token of padding."""
    padded = fit(batch_size=4, accumulate=1)
    packed = fit(batch_size=4, accumulate=1, packing=True, loss_tokens=loss_tokens)
    for (name, a), (_, b) in zip(padded.model.named_parameters(), packed.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    for key in ("loss", "tokens", "input_tokens"):
        assert [s[key] for s in packed.history] == pytest.approx([s[key] for s in padded.history], rel=1e-5)


def test_a_packed_batch_is_one_row_of_all_tokens(conversations):
    batch = pack(conversations((3, 2), trained_share=1.0))
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["input_ids"].shape == (1, 5)
    assert (batch["labels"] == IGNORED).tolist() == [[True, False, False, True, False]]


def test_a_last_window_that_is_not_full_is_averaged_over_its_own_tokens(fit):
    # Three conversations in windows of two: the second window of the pass holds one.
    uneven = fit(batch_size=1, accumulate=2, steps=2, lengths=(20, 20, 20))
    reference = fit(batch_size=2, accumulate=1, steps=2, lengths=(20, 20, 20))
    for a, b in zip(uneven.model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_losses_follow_a_plain_loop(conversations, fit, short_vocabulary):
    module = fit(
        batch_size=4,
        accumulate=1,
        steps=3,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0),
        callbacks=[GradientClipping(0.3)],
    )
    model = AutoModelForCausalLM.from_pretrained(short_vocabulary, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses, norms = [], []
    loader = ChatDataModule(conversations((5, 40, 12, 33)), 4, 0, seed=0).train_dataloader()
    for _ in range(3):
        for batch in loader:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            labels = batch["labels"][:, 1:]
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)))
            optimizer.step()
            losses.append(loss.item())
    assert [s["loss"] for s in module.history] == pytest.approx(losses, rel=1e-5)
    assert [s["gradient_norm"] for s in module.history] == pytest.approx(norms, rel=1e-4)


def test_clipping_acts_on_the_accumulated_gradient(fit, short_vocabulary):
    clipping = GradientClipping(max_norm=0.01)
    start = AutoModelForCausalLM.from_pretrained(short_vocabulary, dtype=torch.float32)
    module = fit(batch_size=1, accumulate=4, steps=1, callbacks=[clipping])
    moved = sum(float(((a - b) ** 2).sum()) for a, b in zip(module.model.parameters(), start.parameters(), strict=True))
    assert moved**0.5 == pytest.approx(0.5 * 0.01, rel=1e-3)  # SGD at 0.5 moves by rate times clipped norm
    assert clipping.readings()["clipped_share"].value == 1.0
    assert clipping.readings()["gradient_norm_median"].value > 0.01


def test_throughput_counts_optimizer_steps_and_leaves_warm_up_out(fit):
    throughput = Throughput(warmup_steps=2)
    fit(batch_size=1, accumulate=2, steps=6, callbacks=[throughput])
    readings = throughput.readings()
    assert len(throughput.seconds) == 6
    assert readings["steps_per_second"].n == 4
    assert readings["steps_per_second"].value == pytest.approx(4 / sum(throughput.seconds[2:]))
    assert readings["warmup_time"].value == pytest.approx(sum(throughput.seconds[:2]))
    low, high = readings["steps_per_second"].interval95
    assert low < readings["steps_per_second"].value < high


def test_a_run_without_a_measured_step_says_so(fit):
    throughput = Throughput(warmup_steps=5)
    fit(batch_size=4, accumulate=1, steps=1, callbacks=[throughput])
    assert throughput.readings()["steps_per_second"].value is None
    assert "warm-up" in throughput.readings()["steps_per_second"].reason


def test_conversations_without_a_trained_token_are_dropped_and_counted(conversations):
    rows = [*conversations((10, 20)), Encoded([1, 2, 3], [IGNORED] * 3, truncated=True)]
    data = ChatDataModule(rows, 2, 0, 0)
    assert data.counts == {"conversations": 2, "conversations_truncated": 0, "conversations_dropped": 1}
    with pytest.raises(ValueError, match="max_length"):
        ChatDataModule(rows[2:], 2, 0, 0)


def test_the_loader_goes_on_where_it_was_stopped(conversations):
    rows = conversations(range(5, 25))
    loader = ChatDataModule(rows, 3, 0, seed=7).train_dataloader()
    straight = [batch["input_ids"] for _ in range(2) for batch in loader]
    first, resumed = (ChatDataModule(rows, 3, 0, seed=7).train_dataloader() for _ in range(2))
    iterator = iter(first)
    seen = [next(iterator)["input_ids"] for _ in range(4)]
    resumed.load_state_dict(first.state_dict())
    seen += [batch["input_ids"] for batch in resumed] + [batch["input_ids"] for batch in resumed]
    assert len(seen) == len(straight)
    assert all(torch.equal(a, b) for a, b in zip(seen, straight, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(straight[:7], straight[7:], strict=True))  # passes differ
