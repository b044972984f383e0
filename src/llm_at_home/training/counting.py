"""What a training batch holds: conversations, tokens, and tokens that the loss looks at.

Batches are counted on the host, before they go to a GPU, which would have to finish all that it does first.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from llm_at_home.models.chat import IGNORED


def counted(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with ``lengths``, a list, and ``targets``, a number: what the functions here find without looking."""
    return {**batch, "lengths": lengths_in(batch), "targets": targets_in(batch)}


def lengths_in(batch: Mapping[str, Any]) -> list[int]:
    """The tokens of each conversation of a batch, padding not counted."""
    if "lengths" in batch:
        return list(batch["lengths"])
    if "position_ids" in batch:
        ends = (batch["position_ids"][0, 1:] == 0).nonzero().flatten() + 1
        return [b - a for a, b in itertools.pairwise([0, *ends.tolist(), batch["position_ids"].shape[1]])]
    if "attention_mask" in batch:
        return [int(length) for length in batch["attention_mask"].sum(1)]
    rows, length = batch["input_ids"].shape
    return [length] * rows


def targets_in(batch: Mapping[str, Any]) -> int:
    """How many tokens of a batch the loss looks at."""
    return batch["targets"] if "targets" in batch else int((batch["labels"][:, 1:] != IGNORED).sum())


def tokens_in(batch: Mapping[str, Any]) -> int:
    """How many tokens of conversations a batch has, padding not counted."""
    return sum(lengths_in(batch))


def pairs_in(batch: Mapping[str, Any]) -> int:
    """How many pairs of a token and one that it attends to, itself among them, a batch has, padding not counted."""
    return sum(length * (length + 1) // 2 for length in lengths_in(batch))
