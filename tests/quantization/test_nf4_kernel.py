"""nf4 weights that are read back by this project's kernel: the values of bitsandbytes, to the bit."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from llm_at_home.hardware import device as hardware
from llm_at_home.records.schema import Record
from llm_at_home.tasks import train

on_a_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is a GPU's")


@pytest.mark.slow
def test_the_kernel_reads_back_what_float64_does(interpreted) -> None:
    interpreted(__file__, "interpreted_nf4.py", 4)


@on_a_card
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("block_size", "rows"), [(64, 96), (64, 1000), (512, 33)])
def test_a_card_reads_back_bitsandbytes_values(dtype, block_size, rows):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from llm_at_home.quantization import nf4_kernel

    weight = torch.randn(rows, 1024, device="cuda", dtype=dtype)
    packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=block_size)
    found = torch.empty_like(weight)
    nf4_kernel.dequantize(packed, state.absmax, block_size, found)
    assert torch.equal(found, dequantize_4bit(packed, state))
    assert 0 < float((found - weight).float().std()) < 0.2


@on_a_card
@pytest.mark.parametrize(("kind", "nested", "ours"), [("nf4", False, True), ("nf4", True, True), ("fp4", False, False)])
def test_a_card_s_products_are_the_same_within(kind, nested, ours, monkeypatch):
    from bitsandbytes.nn import Linear4bit, Params4bit

    from llm_at_home.quantization import nf4_kernel

    layer = Linear4bit(512, 768, bias=False, compute_dtype=torch.bfloat16, compress_statistics=nested, quant_type=kind)
    weight = torch.randn(768, 512, dtype=torch.bfloat16)
    layer.weight = Params4bit(weight, requires_grad=False, compress_statistics=nested, quant_type=kind).to("cuda")
    x = torch.randn(2000, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def both():
        y = layer(x)
        return y, *torch.autograd.grad(y.float().square().sum(), x)

    read, dequantize = [], nf4_kernel.dequantize
    monkeypatch.setattr(nf4_kernel, "dequantize", lambda *given: (read.append(1), dequantize(*given)))
    wanted = both()
    with nf4_kernel.in_place_of_bitsandbytes_own():
        found = both()
    assert len(read) == 2 * ours  # forth and back
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    both()
    assert len(read) == 2 * ours


NF4 = {"method": "bitsandbytes", "config": {"bnb_4bit_quant_type": "nf4"}}
FP4 = {"method": "bitsandbytes", "config": {"bnb_4bit_quant_type": "fp4"}}


@pytest.mark.parametrize(
    ("quant", "captured", "capability", "triton", "taken"),
    [
        (NF4, True, (8, 0), True, True),
        (NF4, False, (8, 0), True, False),
        (NF4, True, (7, 5), True, False),
        (NF4, True, (8, 0), False, False),
        (FP4, True, (8, 0), True, False),
        ({"method": "dense"}, True, (8, 0), True, False),
    ],
)
def test_a_run_takes_it_in_graphs_of_nf4_on_cards_that_have_triton(
    monkeypatch, quant, captured, capability, triton, taken
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: triton or None)
    ours, record = nullcontext(), Record("train", kernel={"linear": "Linear4bit"})
    stand_in = SimpleNamespace(in_place_of_bitsandbytes_own=lambda: ours)  # the module wants Triton
    monkeypatch.setitem(sys.modules, "llm_at_home.quantization.nf4_kernel", stand_in)
    found = train._read_back({"quant": quant}, torch.device("cuda"), captured, record)
    assert (found is ours) == taken
    assert record.kernel == {"linear": "Linear4bit", **({"nf4_read_back": "triton"} if taken else {})}
    assert not hardware.runs_triton(torch.device("cpu"))
