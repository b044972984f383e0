"""Wanda: weights go by |weight| x norm of the input that they meet (Sun et al. 2023, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llm_at_home.pruning.pattern import Pattern


class Statistics:
    """The Euclidean norm of each input over all calibration tokens.

    Args:
        width: how many inputs there are.
        device: where they are added up.
        dtype: of the sums.
    """

    def __init__(self, width: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> None:
        self.squares = torch.zeros(width, device=device, dtype=dtype)

    def add(self, inputs: torch.Tensor) -> None:
        """Count more tokens, of shape (tokens, width)."""
        self.squares += inputs.to(self.squares.dtype).square().sum(dim=0)

    @property
    def norms(self) -> torch.Tensor:
        """Of shape (width,)."""
        return self.squares.sqrt()


def prune(weight: torch.Tensor, statistics: Statistics, pattern: Pattern, options: Mapping[str, Any]) -> torch.Tensor:
    """The weight, of shape (outputs, inputs), with the same share of each output's entries at zero.

    Inputs that are always zero score nothing, so their weights go first.
    """
    return weight.masked_fill(pattern.lowest(weight.abs() * statistics.norms, by_row=True), 0)
