"""Gives a process no more GPU memory than a smaller card of the catalogue has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.hardware.nvml import ask, session
from llm_at_home.hardware.present import present_gpus


def cap_memory(gpu: Mapping[str, Any]) -> dict[str, Any] | None:
    """Limit this process's CUDA memory to the chosen card's. Call it in the child, before anything touches CUDA.

    The CUDA context, which this opens, lives on the card too and is taken off the limit. torch's allocator raises its
    usual ``OutOfMemoryError`` at the limit; it compares what it holds and wants with the limit before it maps or
    allocates anything, with ``expandable_segments`` as without. What other libraries allocate by themselves is not
    limited.

    Args:
        gpu: the group as :func:`~llm_at_home.hardware.device.resolve_device` returns it.

    Returns:
        None where no card is emulated; else what was done, for the record, in GB of 10^9 bytes: ``emulated``,
        ``host_card``, ``memory_gb`` (the card's), ``context_gb`` with ``context_method``, and ``limit_gb``, which is
        what torch may hold.

    Raises:
        Refusal: when the context alone fills the card.
    """
    if not gpu.get("emulated"):
        return None
    import torch

    # The driver's figure of before is worth something only if the context is not in it yet.
    before = None if torch.cuda.is_initialized() else _used_on_card()
    torch.cuda.init()
    free, total = torch.cuda.mem_get_info(0)  # this makes the context; init alone does not
    context, method = _context(before, total - free, torch.cuda.memory_reserved(0))
    limit = min(gpu["memory"] * 1e9, total) - context
    if limit <= 0:
        raise Refusal(f"gpu={gpu['name']}: the CUDA context of {context / 1e9:.2f} GB leaves no memory on this card")
    torch.cuda.set_per_process_memory_fraction(limit / total, 0)
    return {
        "emulated": gpu["name"],
        "host_card": gpu["card"],
        "memory_gb": gpu["memory"],
        "context_gb": round(context / 1e9, 3),
        "context_method": method,
        "limit_gb": round(limit / 1e9, 3),
    }


def _context(before: int | None, in_use: int, reserved: int) -> tuple[int, str]:
    """Bytes of this process on the card beside torch's own, and how they were found; the first way that works."""
    process = _used_by_this_process()
    if process is not None:
        return max(process - reserved, 0), "nvml_process"
    after = _used_on_card()
    if before is not None and after is not None:
        return max(after - before - reserved, 0), "nvml_difference"
    # This counts whatever other processes hold: too much rather than too little.
    return max(in_use - reserved, 0), "cuda_total_less_free"


def _used_on_card() -> int | None:
    with session() as nvml:
        memory = _of_first_gpu(nvml, "nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.used)


def _used_by_this_process() -> int | None:
    with session() as nvml:
        processes = _of_first_gpu(nvml, "nvmlDeviceGetComputeRunningProcesses") or []
        # In a container the driver lists the host's process ids, or none.
        mine = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
        return int(mine[0]) if mine and mine[0] is not None else None


def _of_first_gpu(nvml: Any, function: str) -> Any | None:
    if nvml is None or not present_gpus():
        return None
    handle = ask(nvml, "nvmlDeviceGetHandleByUUID", present_gpus()[0].uuid)
    return None if handle is None else ask(nvml, function, handle)
