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
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """See ``kernels.rotate_and_store``."""
    cos, sin = (table[positions].unsqueeze(1) for table in tables)
    keys[places, :, positions] = _rotated(k, cos, sin)
    values[places, :, positions] = v
    return _rotated(q, cos, sin)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, scale: float
) -> torch.Tensor:
    """See ``kernels.attend``; the whole capacity is read."""
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
