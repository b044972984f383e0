"""The kernel that reads nf4 back, against float64; ``test_nf4_kernel`` runs this with Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from llm_at_home.quantization import nf4_kernel


@pytest.mark.parametrize(("block_size", "rows"), [(64, 70), (256, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_times_scales(block_size: int, rows: int, dtype: torch.dtype) -> None:
    weight = torch.randn(rows, 512, generator=torch.Generator().manual_seed(rows)).to(dtype)
    packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=block_size)
    found = torch.empty_like(weight)
    assert nf4_kernel.takes(packed, state.absmax, block_size, found)
    nf4_kernel.dequantize(packed, state.absmax, block_size, found)
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1, block_size).long()
    wanted = (state.code.double()[codes] * state.absmax.double()[:, None]).view(weight.shape)
    # The interpreter cuts bfloat16 off where a card rounds.
    off = torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 else 0.5)
    assert ((found.double() - wanted).abs() <= off * wanted.abs() + 1e-12).all()
    if dtype == torch.float16:
        assert torch.equal(found, dequantize_4bit(packed, state))
    for refused in (found[:, :-1], found.float(), torch.empty(2 * rows, 512, dtype=dtype)):
        assert not nf4_kernel.takes(packed, state.absmax, block_size, refused)
    assert not nf4_kernel.takes(packed.view(torch.int8), state.absmax, block_size, found)
