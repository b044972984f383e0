"""The dense peak of this device: the fastest of some plain matrix products, in the dtype that a run computes in."""

from __future__ import annotations

from typing import Any

from llm_at_home.metering.timing import now
from llm_at_home.records.schema import Reading

SIZES = {"cuda": 8192, "cpu": 768}
REPEATS = {"cuda": 20, "cpu": 8}
WARM_UP = 3
SECONDS = 2.0  # after which no further product is started: bfloat16 takes a CPU without such instructions 1 s each


def dense_peak(device: str, dtype: str) -> Reading:
    """``dense_peak`` in TFLOP/s: 2 n^3 FLOPs over the time of the fastest n x n product, without sparsity.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: ``float32`` (without TF32, as torch has it), ``bfloat16`` or ``float16``.
    """
    size, repeats = SIZES[device], REPEATS[device]
    try:
        times = _times(device, dtype, size, WARM_UP + repeats)
    except RuntimeError as error:  # out of memory on a small card, or a dtype without a kernel
        return Reading.unknown("TFLOP/s", str(error).splitlines()[0])
    finally:
        if device == "cuda":
            import torch

            torch.cuda.empty_cache()
    measured = times[min(WARM_UP, len(times) - 1) :]
    return Reading(2 * size**3 / min(measured) / 1e12, "TFLOP/s", f"fastest_matmul_of_{size}", n=len(measured))


def _times(device: str, dtype: str, size: int, most: int) -> list[float]:
    """Seconds of each product: two at least, the first of which warms up."""
    import torch

    # Of its own, so that a run draws the numbers that it would draw without this.
    drawn = torch.Generator(device).manual_seed(0)
    form: Any = {"device": device, "dtype": getattr(torch, dtype), "generator": drawn}
    a, b = (torch.randn(size, size, **form) for _ in range(2))
    times: list[float] = []
    while len(times) < 2 or (len(times) < most and sum(times) < SECONDS):
        start = now(device)
        torch.matmul(a, b)
        times.append(now(device) - start)
    return times
