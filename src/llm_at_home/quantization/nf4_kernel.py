"""A Triton kernel that reads nf4 weights back, at the bandwidth of a copy, where training is fast.

bitsandbytes' own takes 1.3 to 1.4 times as long (H100), twice for each weight and micro-batch of Q-LoRA. The values
are the same to the bit: a code of QLoRA's table (Dettmers et al. 2023, appendix E) times its block's scale in float32.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl

BYTES_AT_ONCE = 2048  # of packed weights, by a program
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _dequantize(packed, scales, table, out, blocks, HALF: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < blocks
    place = row[:, None].to(tl.int64) * HALF + tl.arange(0, HALF)[None, :]
    pair = tl.load(packed + place, mask=inside[:, None], other=0).to(tl.int32)
    pair = tl.reshape(pair, (ROWS * HALF,))
    scale = tl.load(scales + row, mask=inside, other=0.0)[:, None]
    codes = tl.load(table + tl.arange(0, 16))
    first = tl.reshape(tl.gather(codes, pair >> 4, 0), (ROWS, HALF)) * scale
    second = tl.reshape(tl.gather(codes, pair & 15, 0), (ROWS, HALF)) * scale
    low = first.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
    high = second.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
    tl.store(out + place, (low | (high << 16)).to(tl.int32, bitcast=True), mask=inside[:, None])


def takes(packed: torch.Tensor, scales: torch.Tensor, block_size: int, out: torch.Tensor) -> bool:
    """Whether the kernel reads such weights: whole blocks, into 16 bits."""
    whole = out.numel() == scales.numel() * block_size == 2 * packed.numel()
    lies_well = packed.is_contiguous() and out.is_contiguous() and out.data_ptr() % 4 == 0
    return whole and lies_well and packed.dtype == torch.uint8 and scales.dtype == torch.float32 and out.dtype in DTYPES


def dequantize(packed: torch.Tensor, scales: torch.Tensor, block_size: int, out: torch.Tensor) -> None:
    """Write the weights into ``out``.

    Args:
        packed: uint8, two codes a byte, the first in the upper half.
        scales: float32, one for each block.
        block_size: weights in a block, a power of two.
        out: as :func:`takes` wants it.
    """
    half = block_size // 2
    rows = max(1, BYTES_AT_ONCE // half)
    grid = (triton.cdiv(scales.numel(), rows),)
    _dequantize[grid](
        packed,
        scales,
        _table(out.device),
        out.view(-1).view(torch.int32),
        scales.numel(),
        HALF=half,
        ROWS=rows,
        DTYPE=DTYPES[out.dtype],
        num_warps=4,
    )


@functools.cache
def _table(device: torch.device) -> torch.Tensor:
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type("nf4", device=device)


@contextmanager
def in_place_of_bitsandbytes_own() -> Iterator[None]:
    """Let bitsandbytes' products on a GPU read nf4 weights back with this kernel; what it does not take is theirs."""
    ops: Any = importlib.import_module("bitsandbytes.backends.cuda.ops")
    theirs = ops._dequantize_4bit_impl

    def read_back(
        packed: torch.Tensor, scales: torch.Tensor, block_size: int, kind: str, dtype: torch.dtype, out: torch.Tensor
    ) -> None:
        if kind == "nf4" and takes(packed, scales, block_size, out):
            dequantize(packed, scales, block_size, out)
        else:
            theirs(packed, scales, block_size, kind, dtype, out=out)

    ops._dequantize_4bit_impl = read_back
    try:
        yield
    finally:
        ops._dequantize_4bit_impl = theirs
