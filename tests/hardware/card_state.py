"""What tests/metering's fake driver does not answer: clocks, temperature, utilisation, throttling, default limits."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

# nvml.h
SW_POWER_CAP, HW_SLOWDOWN, SW_THERMAL, HW_THERMAL, POWER_BRAKE = 0x4, 0x8, 0x20, 0x40, 0x80


def answer(of_slices: bool = False, **functions: Any) -> None:
    """Let the fake driver in place answer these functions with these values (called where callable).

    A slice's handle is refused as Not Supported unless ``of_slices``; a value of None is Not Supported for all.
    """
    nvml = sys.modules["pynvml"]
    for name, value in functions.items():
        setattr(nvml, name, _function(nvml, value, of_slices))


def _function(nvml: Any, value: Any, of_slices: bool) -> Any:
    def call(handle: Any, *arguments: Any) -> Any:
        nvml.nvmlDeviceGetUUID(handle)  # needs an open driver
        if value is None or (handle.mig is not None and not of_slices):
            raise nvml.NVMLError(nvml.NVML_ERROR_NOT_SUPPORTED)
        return value(*arguments) if callable(value) else value

    return call


def process(pid: int, used: int | None = 2_000_000_000) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


def clean() -> None:
    """A card at rest, as a recent driver describes it."""
    answer(
        nvmlDeviceGetUtilizationRates=SimpleNamespace(gpu=0, memory=0),
        nvmlDeviceGetCurrentClocksEventReasons=1,  # idle
        nvmlDeviceGetPowerManagementDefaultLimit=300_000,
        nvmlDeviceGetClockInfo=lambda kind: {1: 210, 2: 405}[kind],
        nvmlDeviceGetTemperature=lambda sensor: {0: 31}[sensor],
        nvmlDeviceGetPerformanceState=8,
    )
    answer(of_slices=True, nvmlDeviceGetGraphicsRunningProcesses=[])
