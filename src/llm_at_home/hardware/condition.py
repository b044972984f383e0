"""Whether the card is fit to be measured: who else uses it, what holds its clocks back, and its state in figures.

Every question may go unanswered (an old card, a MIG slice, a container); then its flag or field is absent.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.hardware.nvml import ask, session, whole_card
from llm_at_home.hardware.present import present_gpus

BUSY_PERCENT = 10
# The driver's own share may be in the first figure; the second leaves it out.
IN_USE_GB, IN_USE_WITHOUT_RESERVED_GB = 1.0, 0.25
POWER_TOLERANCE = 0.01
# nvml.h, nvmlClocksEventReasons: those that say that the card is slower than it should be. The software's power cap is
# left out, for a card at its limit under load is as it should be.
THROTTLE = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
CLOCK_SM, CLOCK_MEMORY, TEMPERATURE_GPU = 1, 2, 0  # nvml.h


def card_condition(gpu: Mapping[str, Any]) -> list[str]:
    """What makes figures from the first visible GPU doubtful, one line each; empty on the CPU or on a clean card.

    Call it before this process touches CUDA: where the driver shows no process ids, its own memory would count as
    another's.

    Args:
        gpu: the group as :func:`~llm_at_home.hardware.device.resolve_device` returns it.
    """
    if gpu["device"] != "cuda" or not present_gpus():
        return []
    with session() as nvml:
        handle = None if nvml is None else ask(nvml, "nvmlDeviceGetHandleByUUID", present_gpus()[0].uuid)
        if handle is None:
            return []
        card = whole_card(nvml, handle)
        others = _foreign_processes(nvml, handle) or _foreign_memory(nvml, handle)
        return [*others, *_busy(nvml, card), *_throttled(nvml, card), *_power_limit(nvml, card, gpu)]


def require_clean(flags: Sequence[str], strict: bool) -> None:
    """Refuse to measure on a card with flags when ``strict`` is set.

    Raises:
        Refusal: naming all of them.
    """
    if strict and flags:
        raise Refusal(f"strict=true and the card is not clean: {'; '.join(flags)}; wait, or strict=false")


def snapshot() -> dict[str, Any]:
    """The first visible GPU's state now, for provenance before and after a run; empty without a GPU.

    Keys, where the driver answers: ``sm_clock_mhz``, ``memory_clock_mhz``, ``temperature_c``, ``power_limit_w``,
    ``power_draw_w``, ``performance_state`` (``P0`` is the highest) and ``throttle_reasons``.
    """
    if not present_gpus():
        return {}
    with session() as nvml:
        handle = None if nvml is None else ask(nvml, "nvmlDeviceGetHandleByUUID", present_gpus()[0].uuid)
        if handle is None:
            return {}
        card = whole_card(nvml, handle)
        limit, draw = ask(nvml, "nvmlDeviceGetEnforcedPowerLimit", card), ask(nvml, "nvmlDeviceGetPowerUsage", card)
        state = ask(nvml, "nvmlDeviceGetPerformanceState", card)
        found = {
            "sm_clock_mhz": ask(nvml, "nvmlDeviceGetClockInfo", card, CLOCK_SM),
            "memory_clock_mhz": ask(nvml, "nvmlDeviceGetClockInfo", card, CLOCK_MEMORY),
            "temperature_c": ask(nvml, "nvmlDeviceGetTemperature", card, TEMPERATURE_GPU),
            "power_limit_w": None if limit is None else limit / 1000,
            "power_draw_w": None if draw is None else draw / 1000,
            "performance_state": None if state is None else f"P{state}",
            "throttle_reasons": _throttle_reasons(nvml, card),
        }
        return {key: value for key, value in found.items() if value is not None}


def _foreign_processes(nvml: Any, handle: Any) -> list[str]:
    import psutil

    mine = {process.pid for process in psutil.Process().children(recursive=True)} | {psutil.Process().pid}
    found: dict[int, float | None] = {}
    for function in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
        for process in ask(nvml, function, handle) or []:
            found[process.pid] = process.usedGpuMemory
    foreign = {pid: used for pid, used in found.items() if pid not in mine}
    unknown = [pid for pid in foreign if not psutil.pid_exists(pid)]
    if _holds_cuda() and not mine & set(found) and len(unknown) == 1:
        del foreign[unknown[0]]  # the driver gives the host's process ids: this one is ours
    return [
        f"process {pid} uses the card" + (f" ({used / 1e9:.1f} GB)" if used else "")
        for pid, used in sorted(foreign.items())
    ]


def _foreign_memory(nvml: Any, handle: Any) -> list[str]:
    if _holds_cuda():
        return []
    version = getattr(nvml, "nvmlMemory_v2", None)
    memory = None if version is None else ask(nvml, "nvmlDeviceGetMemoryInfo", handle, version)
    threshold = IN_USE_WITHOUT_RESERVED_GB
    if memory is None:
        memory, threshold = ask(nvml, "nvmlDeviceGetMemoryInfo", handle), IN_USE_GB
    if memory is None or memory.used / 1e9 <= threshold:
        return []
    return [f"{memory.used / 1e9:.1f} GB of the card's memory are in use by others"]


def _holds_cuda() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def _busy(nvml: Any, card: Any) -> list[str]:
    rates = ask(nvml, "nvmlDeviceGetUtilizationRates", card)
    return [f"the card is {rates.gpu} % busy"] if rates is not None and rates.gpu > BUSY_PERCENT else []


def _throttle_reasons(nvml: Any, card: Any) -> list[str] | None:
    reasons = ask(nvml, "nvmlDeviceGetCurrentClocksEventReasons", card)
    if reasons is None:  # the name before driver 535
        reasons = ask(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", card)
    return None if reasons is None else [name for bit, name in THROTTLE.items() if reasons & bit]


def _throttled(nvml: Any, card: Any) -> list[str]:
    return [f"clocks are held back: {name}" for name in _throttle_reasons(nvml, card) or []]


def _power_limit(nvml: Any, card: Any, gpu: Mapping[str, Any]) -> list[str]:
    limit = ask(nvml, "nvmlDeviceGetEnforcedPowerLimit", card)
    default = ask(nvml, "nvmlDeviceGetPowerManagementDefaultLimit", card)
    # An emulated card's limit says nothing about the card that computes.
    expected = {} if gpu.get("emulated") or not gpu.get("power_limit") else {"the catalogue's": gpu["power_limit"]}
    if default is not None:
        expected["the card's default"] = default / 1000
    if limit is None:
        return []
    return [
        f"the power limit is {limit / 1000:.0f} W, not {whose} {watts:.0f} W"
        for whose, watts in expected.items()
        if abs(limit / 1000 - watts) > POWER_TOLERANCE * watts
    ]
