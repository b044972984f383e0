"""The operations of a decode step in plain torch, as transformers computes them; the twins of ``kernels``."""

from __future__ import annotations

import torch
from torch.nn import functional


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``kernels.add_rms_norm``."""
    hidden = x if delta is None else x + delta
    wide = hidden.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return hidden, weight * scaled.to(hidden.dtype)


def rotate_and_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    places: torch.Tensor,
    pages: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """See ``kernels.rotate_and_store``."""
    cos, sin = (table[positions].unsqueeze(1) for table in tables)
    page, spot = spots(pages, places, positions, keys.shape[2])
    keys[page, :, spot] = _rotated(k, cos, sin)
    values[page, :, spot] = v
    return _rotated(q, cos, sin)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def spots(
    pages: torch.Tensor, places: torch.Tensor, positions: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The page of each token, and where in it, both of shape (tokens,).

    Args:
        pages: of each place's positions, of shape (places, pages of the longest).
        places: of the tokens, of shape (tokens,).
        positions: the same.
        size: tokens of a page.
    """
    return pages[places, positions // size], positions % size


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """See ``kernels.attend``; as much is read of each sequence as of the longest, on a GPU that there could be."""
    if not positions.is_cuda:  # a graph cannot ask how long the longest is
        pages = pages[:, : int(positions.max()) // keys.shape[2] + 1]
    heads = torch.arange(keys.shape[1], device=q.device)[:, None]
    keys, values = (cache[pages[:, None], heads].flatten(2, 3) for cache in (keys, values))
    seen = torch.arange(keys.shape[2], device=q.device) <= positions[:, None]
    return functional.scaled_dot_product_attention(
        q.unsqueeze(2),
        keys,
        values,
        attn_mask=seen[:, None, None, :],
        scale=scale,
        enable_gqa=q.shape[1] != keys.shape[1],
    ).squeeze(2)


def silu_multiply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See ``kernels.silu_multiply``."""
    return functional.silu(gate) * up


def matvec(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See ``kernels.matvec``."""
    return functional.linear(x, weight, bias)
