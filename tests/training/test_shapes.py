"""Batches of a few shapes: the same losses and updates as batches of their own, and as many tokens counted."""

from __future__ import annotations

import pytest
import torch

from llm_at_home.errors import Refusal
from llm_at_home.models.chat import IGNORED
from llm_at_home.training.counting import pairs_in, tokens_in
from llm_at_home.training.data import ChatDataModule, collate, pack
from llm_at_home.training.probes import check_unmasked
from llm_at_home.training.shapes import Shapes

LENGTHS = (5, 40, 12, 33, 21, 17, 9)  # of which the last batch has fewer


def test_every_batch_has_one_of_the_shapes(conversations):
    rows = conversations(range(3, 60))
    shapes = Shapes(rows=4, longest=60, lengths=3)
    loader = ChatDataModule(rows, 4, 7, seed=0, shapes=shapes).train_dataloader()
    plain = ChatDataModule(rows, 4, 7, seed=0).train_dataloader()
    seen = set()
    for batch, own in zip(loader, plain, strict=True):
        seen.add(tuple(batch["input_ids"].shape))
        assert tokens_in(batch) == tokens_in(own)
        assert pairs_in(batch) == pairs_in(own)
        assert (batch["labels"] != IGNORED).sum() == (own["labels"] != IGNORED).sum()
        assert "attention_mask" not in batch
    assert seen <= {(4, 24), (4, 48), (4, 60)}
    assert len(seen) > 1


@pytest.mark.parametrize(("length", "rounded"), [(1, 104), (104, 104), (105, 208), (399, 400), (400, 400)])
def test_lengths_are_rounded_up_and_never_beyond_the_longest(length, rounded):
    assert Shapes(rows=1, longest=400, lengths=4).rounded(length) == rounded


def test_padding_is_one_more_packed_conversation(conversations):
    own = pack(conversations((3, 5), trained_share=1.0))
    batch = Shapes(rows=2, longest=32, lengths=2).fill(own, pad_id=7)
    assert batch["input_ids"].shape == (1, 16)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, *range(8)]]
    assert batch["lengths"] == [3, 5]
    assert (batch["labels"][0, 8:] == IGNORED).all()
    assert pairs_in(batch) == pairs_in(own) == 6 + 15


def test_pairs_are_those_that_a_causal_mask_lets_see_each_other(conversations):
    rows = conversations((3, 5))
    assert pairs_in(collate(rows, 0)) == pairs_in(pack(rows)) == 6 + 15


@pytest.mark.parametrize(("packing", "loss_tokens"), [(False, None), (True, 8)])
def test_the_update_is_that_of_batches_of_their_own(fit, packing, loss_tokens):
    order = {"batch_size": 3, "accumulate": 2, "steps": 3, "lengths": LENGTHS, "packing": packing}
    shapes = Shapes(rows=3, longest=120 if packing else 40, lengths=3)
    wanted = fit(**order)
    found = fit(**order, shapes=shapes, loss_tokens=loss_tokens)
    for key in ("loss", "tokens", "input_tokens"):
        assert [s[key] for s in found.history] == pytest.approx([s[key] for s in wanted.history], rel=1e-5), key
    for (name, a), (_, b) in zip(wanted.model.named_parameters(), found.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_a_model_that_looks_ahead_is_refused(tiny_model):
    from transformers import AutoModelForCausalLM

    class LooksAhead(torch.nn.Module):
        def forward(self, hidden):
            return hidden + hidden.mean(1, keepdim=True)

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    check_unmasked(model, list(range(20, 60)), "float32")
    model.model.norm = LooksAhead()
    with pytest.raises(Refusal, match=r"trainer\.padded_lengths=null"):
        check_unmasked(model, list(range(20, 60)), "float32")
