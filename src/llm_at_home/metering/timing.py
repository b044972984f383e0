"""Time at device-synchronised edges, and the interval that repeated observations give."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

# Two-sided 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom; beyond, the normal's 1.96 is within 2 %.
_T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given; nothing to wait for on the CPU."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def now(device: str = "cpu") -> float:
    """Seconds on a monotonic clock, after the device has finished."""
    synchronize(device)
    return time.perf_counter()


def mean_interval95(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean by Student's t; None for fewer than two observations."""
    n = len(values)
    if n < 2:
        return None
    quantile = _T975[n - 2] if n - 2 < len(_T975) else 1.96
    half = quantile * statistics.stdev(values) / math.sqrt(n)
    mean = statistics.fmean(values)
    return (mean - half, mean + half)


def percentile(values: Sequence[float], share: float) -> float:
    """The ``share`` quantile (0 to 1) by linear interpolation between order statistics.

    Raises:
        ValueError: for no values.
    """
    if not values:
        raise ValueError("no values, no percentile")
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
