"""Peak memory under its several names: torch allocated, torch reserved, process, device, and resident set.

A server that this process started and that holds the model for it (llama.cpp's) counts: ``resident_set_peak`` is then
the sum of both high-water marks, its method says so, and ``server_resident_set_peak`` is the server's share.

GB are 10^9 bytes everywhere. Each peak is given twice: since the model began to load, and (prefix ``measured_``) for
the measured phase alone. torch and the kernel keep their own high-water marks; what only the driver knows (process and
device) is sampled by a process of its own (:mod:`llm_at_home.metering.sampler`).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from llm_at_home.metering import session
from llm_at_home.records.schema import Reading

VMSTAT = Path("/proc/vmstat")
CPU_ONLY = "the run used the CPU only"
TORCH_PEAKS = ("torch_allocated_peak", "torch_reserved_peak")
DRIVER_FIGURES = ("process_memory_peak", "device_memory_peak")

_names = itertools.count()
# Processes that hold the model for this one, and the peak of each that was ended, in KiB.
_servers: dict[int, int | None] = {}


def count_process(pid: int) -> None:
    """A process that this one started holds the model for it: its resident set counts from now on."""
    _servers[pid] = None


def process_ends(pid: int) -> None:
    """That process is about to be ended: its peak until now still counts for the meters that there are."""
    if pid in _servers:
        _servers[pid] = _status_kilobytes("VmHWM", pid)


class MemoryMeter:
    """Peak memory since it was made, and since :meth:`begin_measured`.

    Close it, or use it as a context manager: the sampler ends then.

    Args:
        device: ``cpu`` or ``cuda``.
        gpus: how many GPUs the job uses: the first visible ones. Figures are sums over them; for torch, of the peaks.
    """

    def __init__(self, device: str, gpus: int = 1) -> None:
        for pid, peak in list(_servers.items()):
            if peak is not None or _status_kilobytes("VmHWM", pid) is None:
                del _servers[pid]  # ended before there was this meter
        self.device = device
        self._gpus = range(gpus)
        self._before: dict[str, float] = {}
        self._measuring = False
        self._driver = _DriverPeaks(gpus) if device == "cuda" else None
        self._can_reset = _reset_resident_peak()
        self._reset_torch()

    def __enter__(self) -> MemoryMeter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the sampler; readings can still be had, and a second time does nothing."""
        if self._driver is not None:
            self._driver.close()

    def begin_measured(self) -> None:
        """The measured phase begins: what was peak until now is kept, and the counters start anew."""
        self._before = self._peaks()
        self._measuring = _reset_resident_peak()
        self._reset_torch()
        if self._driver is not None:
            self._driver.begin_measured()

    def readings(self) -> dict[str, Reading]:
        """Every figure under its own name; those that this device does not have are unknown, with the reason."""
        now = self._peaks()
        figures: dict[str, Reading] = {}
        for name, value in now.items():
            method = "torch_peak" if name in TORCH_PEAKS else "kernel_high_water_mark"
            if name == "resident_set_peak" and _servers:
                method = f"sum_of_{len(_servers) + 1}_kernel_high_water_marks"
            if name == "resident_set_peak" and not self._can_reset:
                method += "_since_process_start"
            figures[name] = Reading(max(value, self._before.get(name, 0.0)), "GB", method)
            if self._before and (self._measuring or name in TORCH_PEAKS):
                figures[f"measured_{name}"] = Reading(value, "GB", method)
        if "resident_set_peak" not in figures:
            why = (
                "the server ended before its memory was read"
                if _servers
                else "the kernel gives no /proc/self/status here"
            )
            figures["resident_set_peak"] = Reading.unknown("GB", why)
        if self._driver is not None:
            return figures | self._driver.readings()
        return figures | {name: Reading.unknown("GB", CPU_ONLY) for name in TORCH_PEAKS + DRIVER_FIGURES}

    def _peaks(self) -> dict[str, float]:
        peaks: dict[str, float] = {}
        resident = _status_kilobytes("VmHWM")
        servers = [peak or _status_kilobytes("VmHWM", pid) for pid, peak in _servers.items()]
        known = [kilobytes for kilobytes in servers if kilobytes is not None]
        if resident is not None and len(known) == len(servers):
            peaks["resident_set_peak"] = (resident + sum(known)) * 1024 / 1e9
            if known:
                peaks["server_resident_set_peak"] = sum(known) * 1024 / 1e9
        if self.device == "cuda":
            import torch

            peaks["torch_allocated_peak"] = sum(torch.cuda.max_memory_allocated(i) for i in self._gpus) / 1e9
            peaks["torch_reserved_peak"] = sum(torch.cuda.max_memory_reserved(i) for i in self._gpus) / 1e9
        return peaks

    def _reset_torch(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.init()  # naming a device, unlike leaving it out, does not do it
            for i in self._gpus:
                torch.cuda.reset_peak_memory_stats(i)


class _DriverPeaks:
    """The driver's two figures, as the sampler sees them: whole (since this was made) and measured."""

    def __init__(self, gpus: int) -> None:
        number = next(_names)
        self._whole, self._measured = f"memory {number}", f"measured memory {number}"
        self._has_measured = False
        self._last: dict[str, Any] | None = None
        self._sampler: session.SamplerSession | None = None
        self._problem = ""
        used = session.used_gpus(gpus)
        if not used:
            self._problem = "the driver names no visible GPU"
            return
        self._sampler = session.borrow(used)
        self._sampler.mark(self._whole)

    def begin_measured(self) -> None:
        self._has_measured = True
        if self._sampler is not None:
            self._sampler.mark(self._measured)

    def close(self) -> None:
        if self._sampler is None:
            return
        self._refresh()
        for name in (self._whole, self._measured):
            self._sampler.drop(name)
        sampler, self._sampler = self._sampler, None
        session.give_back(sampler)

    def _refresh(self) -> None:
        """The sampler's last word. If it died, its peaks until then are no peaks of the phase: they are unknown."""
        if self._sampler is not None:
            self._last, self._problem = self._sampler.read(), self._sampler.problem

    def readings(self) -> dict[str, Reading]:
        self._refresh()
        figures = {}
        for name, key in zip(DRIVER_FIGURES, ("process", "device"), strict=True):
            figures[name] = self._reading(self._whole, key)
            if self._has_measured:
                figures[f"measured_{name}"] = self._reading(self._measured, key)
        return figures

    def _reading(self, window: str, key: str) -> Reading:
        if self._last is None:
            return Reading.unknown("GB", self._problem)
        method = f"nvml_sampled_{self._last['interval'] * 1000:.0f}ms"
        peak = self._last["windows"][window]
        # A device figure that failed in the middle has an unwatched end; a process leaves the driver's list at its own.
        failed = self._last["why_no_device"] if key == "device" else ""
        if peak[key] is None or failed:
            return Reading.unknown("GB", failed or self._last[f"why_no_{key}"], method)
        return Reading(peak[key] / 1e9, "GB", method, n=peak["samples"])


def oom_kills() -> int:
    """How often the kernel's out-of-memory killer has acted since the machine started; 0 where it does not tell."""
    try:
        for line in VMSTAT.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0


def _reset_resident_peak() -> bool:
    try:
        for pid in ("self", *(pid for pid, peak in _servers.items() if peak is None)):
            Path(f"/proc/{pid}/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_kilobytes(field: str, pid: int | str = "self") -> int | None:
    """A memory figure of a process; None where the kernel does not tell, or of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return None
