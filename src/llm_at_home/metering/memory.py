"""Peak memory under its several names: torch allocated, torch reserved, process, device, and resident set.

GB are 10^9 bytes everywhere. Each peak is given twice: since the model began to load, and (prefix ``measured_``) for
the measured phase alone. The resident set's peak is the kernel's own high-water mark, so nothing is sampled.
"""

from __future__ import annotations

import os
from pathlib import Path

from llm_at_home.records.schema import Reading

CPU_ONLY = "the run used the CPU only"
TORCH_PEAKS = ("torch_allocated_peak", "torch_reserved_peak")
DRIVER_FIGURES = ("process_memory", "device_memory")


class MemoryMeter:
    """Peak memory since it was made, and since :meth:`begin_measured`.

    Args:
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._before: dict[str, float] = {}
        self._measuring = False
        self._can_reset = _reset_resident_peak()
        if device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()

    def begin_measured(self) -> None:
        """The measured phase begins: what was peak until now is kept, and the counters start anew."""
        self._before = self._peaks()
        self._measuring = _reset_resident_peak()
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()

    def readings(self) -> dict[str, Reading]:
        """Every figure under its own name; those that this device does not have are unknown, with the reason."""
        now = self._peaks()
        figures: dict[str, Reading] = {}
        for name, value in now.items():
            method = "torch_peak" if name in TORCH_PEAKS else "kernel_high_water_mark"
            if name == "resident_set_peak" and not self._can_reset:
                method += "_since_process_start"
            figures[name] = Reading(max(value, self._before.get(name, 0.0)), "GB", method)
            if self._before and (self._measuring or name in TORCH_PEAKS):
                figures[f"measured_{name}"] = Reading(value, "GB", method)
        if "resident_set_peak" not in figures:
            figures["resident_set_peak"] = Reading.unknown("GB", "the kernel gives no /proc/self/status here")
        if self.device == "cuda":
            figures |= _driver_memory()
        else:
            figures |= {name: Reading.unknown("GB", CPU_ONLY) for name in TORCH_PEAKS + DRIVER_FIGURES}
        return figures

    def _peaks(self) -> dict[str, float]:
        peaks: dict[str, float] = {}
        resident = _status_kilobytes("VmHWM")
        if resident is not None:
            peaks["resident_set_peak"] = resident * 1024 / 1e9
        if self.device == "cuda":
            import torch

            peaks["torch_allocated_peak"] = torch.cuda.max_memory_allocated() / 1e9
            peaks["torch_reserved_peak"] = torch.cuda.max_memory_reserved() / 1e9
        return peaks


def _reset_resident_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_kilobytes(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return None


def _driver_memory() -> dict[str, Reading]:
    """Memory in use at the end as the driver sees it: by this process, and on the whole device.

    torch keeps what it has reserved until the process ends, so this is near the peak unless the allocator had to give
    memory back; the method's name says that it was read at the end.
    """
    import pynvml
    import torch

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        used = pynvml.nvmlDeviceGetMemoryInfo(handle).used
        mine = [p for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
    except pynvml.NVMLError as error:
        return {name: Reading.unknown("GB", f"NVML: {error}") for name in DRIVER_FIGURES}
    figures = {"device_memory": Reading(used / 1e9, "GB", "nvml_at_end")}
    if mine and mine[0].usedGpuMemory is not None:
        figures["process_memory"] = Reading(mine[0].usedGpuMemory / 1e9, "GB", "nvml_at_end")
    else:
        reason = "the driver shows no entry for this process id (usual inside a container)"
        figures["process_memory"] = Reading.unknown("GB", reason)
    return figures
