"""The few shapes that batches of a compiled model have: every batch whole, its length rounded up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llm_at_home.models.chat import IGNORED
from llm_at_home.training.counting import lengths_in

ALIGNED = 8  # tokens: what matrix products and attention kernels want


@dataclass(frozen=True)
class Shapes:
    """Rounds batches up to a few shapes, each of which is compiled once.

    Padding stands on the right, where causal attention never looks: rows need no mask for it, so that attention takes
    its fast kernels, and what padding is computed to is seen by nobody.

    Attributes:
        rows: of each batch; where there are fewer, rows of padding are added.
        longest: tokens of a row at most.
        lengths: how many different lengths there are.
    """

    rows: int
    longest: int
    lengths: int

    def rounded(self, length: int) -> int:
        """The tokens of a row for so many."""
        step = -(-self.longest // self.lengths)
        step = -(-step // ALIGNED) * ALIGNED
        return max(min(-(-length // step) * step, self.longest), length)

    def fill(self, batch: Mapping[str, torch.Tensor], pad_id: int) -> dict[str, Any]:
        """A batch in one of the shapes.

        Args:
            batch: as :func:`~llm_at_home.training.data.collate` or :func:`~llm_at_home.training.data.pack` makes it.
            pad_id: token id of the padding.

        Returns:
            ``input_ids``, ``labels`` and, of packed conversations, ``position_ids``, each of shape (rows, tokens),
            where padding is one more conversation; and ``lengths``, a list of the tokens of each conversation.
        """
        length = batch["input_ids"].shape[1]
        packed = "position_ids" in batch
        shape = (1 if packed else self.rows, self.rounded(length))
        found: dict[str, Any] = {
            "input_ids": _padded(batch["input_ids"], shape, pad_id),
            "labels": _padded(batch["labels"], shape, IGNORED),
            "lengths": lengths_in(batch),
        }
        if packed:
            positions = _padded(batch["position_ids"], shape, 0)
            positions[:, length:] = torch.arange(shape[1] - length)
            found["position_ids"] = positions
        return found


def _padded(values: torch.Tensor, shape: tuple[int, int], fill: int) -> torch.Tensor:
    out = torch.full(shape, fill, dtype=values.dtype)
    out[: values.shape[0], : values.shape[1]] = values
    return out
