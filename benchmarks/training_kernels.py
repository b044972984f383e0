"""Kernels that a training step on a GPU could take, beside each other: reading nf4 back, attention, thin products.

    python benchmarks/training_kernels.py

Shapes are Llama-2-7B's with 8 conversations of 500 tokens, in bfloat16. Each time is of one call within a CUDA graph of
four, replayed 20 times. What is read back is compared to the bit first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import rows as common
import torch

ROWS, TOKENS, HEADS, WIDTH = 8, 500, 32, 128
HIDDEN, INNER = 4096, 11008
RANK = 64
IN_A_GRAPH, REPLAYS = 4, 20


def milliseconds(function: Callable[[], Any]) -> float:
    """Of one call."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(IN_A_GRAPH):
            function()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / REPLAYS / IN_A_GRAPH


def drawn(*shape: int, **options: Any) -> torch.Tensor:
    """Normal numbers on the card."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16, **options)


def reading_back() -> list[list[str]]:
    """nf4 by bitsandbytes' kernel and ours, beside a copy of as many 16-bit values.

    Raises:
        AssertionError: where the two do not give the same bits.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from llm_at_home.quantization import nf4_kernel

    lines = [["weights", "bitsandbytes (ms)", "ours (ms)", "ours (TB/s)", "a copy (TB/s)"]]
    for outputs, inputs in ((HIDDEN, HIDDEN), (INNER, HIDDEN)):
        weight = drawn(outputs, inputs)
        packed, state = quantize_4bit(weight, quant_type="nf4")
        found, size = torch.empty_like(weight), state.blocksize

        def ours(packed: Any = packed, state: Any = state, size: int = size, found: Any = found) -> None:
            nf4_kernel.dequantize(packed, state.absmax, size, found)

        ours()
        assert torch.equal(found, dequantize_4bit(packed, state)), "the two kernels differ"
        mine, theirs = milliseconds(ours), milliseconds(lambda p=packed, s=state: dequantize_4bit(p, s))
        copied = milliseconds(lambda to=found, of=weight: to.copy_(of))
        moved = weight.numel() * (0.5 + 4 / size + 2)
        speeds = [moved / mine / 1e9, weight.numel() * 4 / copied / 1e9]
        lines.append([f"{outputs} x {inputs}", f"{theirs:.4f}", f"{mine:.4f}", *(f"{speed:.2f}" for speed in speeds)])
    return lines


def attention() -> list[list[str]]:
    """Causal attention forth and back, by what torch takes by itself and by two kernels by name."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (drawn(ROWS, TOKENS, HEADS, WIDTH).transpose(1, 2).requires_grad_() for _ in range(3))
    slope = drawn(ROWS, TOKENS, HEADS, WIDTH).transpose(1, 2)

    def both() -> Any:
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.autograd.grad(output, (q, k, v), slope)

    lines = [["attention", "forth and back (ms)"], ["torch's choice", f"{milliseconds(both):.4f}"]]
    for kernel in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(kernel):
            lines.append([kernel.name, f"{milliseconds(both):.4f}"])
    return lines


def thin() -> list[list[str]]:
    """LoRA's products with its first factor, for one module and for several that share their input."""
    x = drawn(ROWS * TOKENS, HIDDEN)
    lines = [["outputs", "forth (ms)", "the input's gradient (ms)", "the weights' (ms)"]]
    for modules in (1, 2, 3):
        weights, slope = drawn(RANK * modules, HIDDEN), drawn(ROWS * TOKENS, RANK * modules)
        calls: Sequence[Callable[[], Any]] = (
            lambda w=weights: x @ w.t(),
            lambda w=weights, s=slope: s @ w,
            lambda s=slope: s.t() @ x,
        )
        lines.append([f"{modules} x {RANK}", *(f"{milliseconds(call):.4f}" for call in calls)])
    return lines


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU: these kernels are for one")
    print(torch.cuda.get_device_name())
    print("\n\n".join(common.markdown(lines) for lines in (reading_back(), attention(), thin())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
