"""The GPUs that this process may use, asked of the driver (NVML) and not of torch, so that it costs milliseconds."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from importlib import metadata
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU as the driver describes it. ``memory`` in GB of 10^9 bytes."""

    index: int
    name: str
    uuid: str
    memory: float
    compute_capability: tuple[int, int]
    driver: str
    power_limit_watts: float | None

    def describe(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return {**self.__dict__, "compute_capability": ".".join(map(str, self.compute_capability))}


@functools.cache
def present_gpus() -> tuple[Gpu, ...]:
    """The visible GPUs (``CUDA_VISIBLE_DEVICES`` as indices or UUIDs), in their order; empty without a driver."""
    import pynvml

    # CUDA's own default puts the fastest card first: its first card would then not be the driver's.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        gpus = [_describe(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()
    return tuple(_visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES")))


def _describe(pynvml: Any, index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    try:
        limit = pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000
    except pynvml.NVMLError:
        limit = None
    return Gpu(
        index=index,
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        memory=pynvml.nvmlDeviceGetMemoryInfo(handle).total / 1e9,
        compute_capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
        driver=_text(pynvml.nvmlSystemGetDriverVersion()),
        power_limit_watts=limit,
    )


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _visible(gpus: list[Gpu], variable: str | None) -> list[Gpu]:
    if variable is None:
        return gpus
    chosen = []
    for entry in filter(None, (part.strip() for part in variable.split(","))):
        match = [gpu for gpu in gpus if entry == str(gpu.index) or gpu.uuid.startswith(entry)]
        if len(match) != 1:
            break  # CUDA itself ignores everything from the first invalid or ambiguous entry on
        chosen.append(match[0])
    return chosen


def torch_can_use_gpu() -> bool:
    """Whether the installed torch is a CUDA build, by its version and without importing it."""
    return "+cpu" not in metadata.version("torch")
