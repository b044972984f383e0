"""Magnitude pruning, layer by layer: the smallest weights of each matrix go (Han et al. 2015)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llm_at_home.pruning.pattern import Pattern

# It looks at no inputs.
Statistics = None


def prune(weight: torch.Tensor, statistics: None, pattern: Pattern, options: Mapping[str, Any]) -> torch.Tensor:
    """The weight, of shape (outputs, inputs), with its smallest entries at zero."""
    return weight.masked_fill(pattern.lowest(weight.abs(), by_row=False), 0)
