"""Where a step's time goes, by torch's profiler: seconds of each kind of kernel (on a CPU, of operation)."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch

# The first whose pattern a name matches, case left out. Inductor's kernels are named after all that they fuse.
KINDS = {
    "compiled, fused": r"^triton_|compiled|inductor",
    "attention": r"flash|fmha|attention|_attn",
    "dequantization": r"dequantize",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitk|::mm|::bmm|addmm",
    "optimizer": r"multi_tensor|adam|foreach|sgd",
    "copies": r"memcpy|memset|copy|fill|::to\b|zero_",
}
OTHER = "elementwise, reductions and other"
LARGEST = 12  # kernels named


def begin(device: str) -> Any:
    """A profiler at work."""
    activity = torch.profiler.ProfilerActivity
    profiler = torch.profiler.profile(activities=[activity.CUDA if device == "cuda" else activity.CPU])
    profiler.start()
    return profiler


def end(profiler: Any, device: str, steps: int) -> dict[str, Any]:
    """Stop it, and say where the time of one step went.

    Returns:
        ``seconds`` by kind, of one step, and ``largest``: names of kernels with theirs. Kernels that run at the same
        time count twice.
    """
    profiler.stop()
    by_kind: Counter[str] = Counter()
    by_name: Counter[str] = Counter()
    for event in profiler.key_averages():
        if device == "cuda":
            if event.device_type != torch.autograd.DeviceType.CUDA:
                continue
            seconds = event.self_device_time_total / 1e6 / steps
        else:
            seconds = event.self_cpu_time_total / 1e6 / steps
        by_kind[kind(event.key)] += seconds
        by_name[event.key[:100]] += seconds
    return {"seconds": dict(by_kind.most_common()), "largest": dict(by_name.most_common(LARGEST))}


def kind(name: str) -> str:
    """The kind of a kernel."""
    return next((found for found, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)
