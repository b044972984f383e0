"""SparseGPT: one-shot pruning that makes up for each weight that goes (Frantar and Alistarh 2023, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llm_at_home.pruning.pattern import Pattern


class Statistics:
    """The Hessian of a layer's squared error, X^T X over all calibration tokens; its scale cancels out.

    Args:
        width: how many inputs there are.
        device: where it is added up.
        dtype: of the sums.
    """

    def __init__(self, width: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> None:
        self.hessian = torch.zeros(width, width, device=device, dtype=dtype)

    def add(self, inputs: torch.Tensor) -> None:
        """Count more tokens, of shape (tokens, width)."""
        inputs = inputs.to(self.hessian.dtype)
        self.hessian.addmm_(inputs.T, inputs)


def prune(weight: torch.Tensor, statistics: Statistics, pattern: Pattern, options: Mapping[str, Any]) -> torch.Tensor:
    """The weight, of shape (outputs, inputs), pruned, with its other entries changed to make up for it.

    Columns go from left to right. A weight w_j that is pruned costs w_j^2 / [H^-1]_jj, H being the Hessian of the
    columns from j on, and those right of it change by -w_j / [H^-1]_jj times row j of that inverse. All these inverses
    are rows of one upper Cholesky factor of H^-1. What is unstructured is chosen in blocks of columns, by the weights
    as they are when the block begins; n:m group by group.

    Args:
        weight: of shape (outputs, inputs), not changed.
        statistics: of its inputs.
        pattern: what is to be zero.
        options: ``damping``, added to the Hessian's diagonal as a share of its mean, and ``block_size``: after so many
            columns those further right are changed, all at once.

    Raises:
        RuntimeError: when the Hessian cannot be inverted.
    """
    weight = weight.clone()
    hessian = statistics.hessian.clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1  # a view: an input that is always zero costs nothing, and must not make H singular
    weight[:, dead] = 0
    diagonal += options["damping"] * diagonal.mean()
    factor = _inverse_factor(hessian)
    columns, size = weight.shape[1], options["block_size"]
    for start in range(0, columns, size):
        end = min(start + size, columns)
        block, inner = weight[:, start:end], factor[start:end, start:end]
        costs = inner.diagonal().square()
        mask = pattern.lowest(block.square() / costs, by_row=False) if not pattern.group else None
        errors = torch.zeros_like(block)
        for j in range(end - start):
            if mask is not None:
                pruned = mask[:, j]
            else:
                if j % pattern.group == 0:
                    group = slice(j, j + pattern.group)
                    chosen = pattern.lowest(block[:, group].square() / costs[group], by_row=True)
                pruned = chosen[:, j % pattern.group]
            errors[:, j] = block[:, j] * pruned / inner[j, j]
            block[:, j:] -= errors[:, j : j + 1] * inner[j, j:]
            block[:, j].masked_fill_(pruned, 0)  # which rounding leaves a little beside
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """U, upper, of H^-1 = U^T U: its row j is the first of [H_j:]^-1 over the root of that row's first entry."""
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed:
        raise RuntimeError("the Hessian of the calibration inputs cannot be inverted: give a larger prune.damping")
    return upper
