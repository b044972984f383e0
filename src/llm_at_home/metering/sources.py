"""The ways to measure energy that a device offers, best first, each with the reason where it offers none."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from llm_at_home.metering import session
from llm_at_home.metering.rapl import RaplCounter
from llm_at_home.metering.sampler import MIG_HAS_NO_POWER

NVML_COUNTER = "nvml_counter"
NVML_POWER_INTEGRAL = "nvml_power_integral"
RAPL = "rapl"

_names = itertools.count()


class EnergySource(Protocol):
    """Something whose joules only grow. ``method`` names it in the readings."""

    method: str

    def edge(self) -> tuple[list[float], float]:
        """Joules, a figure for each part (GPU) that must move under load, and the clock in seconds.

        Raises:
            OSError: when it fails.
            ValueError: when what it gives is no number.
        """
        ...


class NvmlCounter:
    """``nvmlDeviceGetTotalEnergyConsumption`` (mJ since the driver was loaded; Volta and later) of the GPUs in use.

    Raises:
        OSError: when a GPU has no such counter.
    """

    method = NVML_COUNTER

    def __init__(self, uuids: Sequence[str]) -> None:
        import pynvml

        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        except pynvml.NVMLError as error:
            raise OSError(str(error)) from error
        self.edge()  # a GPU without the counter fails here, not in the middle of a run

    def edge(self) -> tuple[list[float], float]:
        """The counters and the clock."""
        try:
            joules = [self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000 for handle in self._handles]
        except self._nvml.NVMLError as error:
            raise OSError(str(error)) from error
        return joules, time.perf_counter()


class PowerIntegral:
    """The sampler's sum of trapezoids over power. The session is the caller's to give back.

    Raises:
        OSError: when there is no power to be had.
    """

    method = NVML_POWER_INTEGRAL

    def __init__(self, sampler: session.SamplerSession) -> None:
        self._sampler = sampler
        self._window = f"energy {next(_names)}"
        self.samples = 0
        self.longest_gap = 0.0
        self.edge()

    def edge(self) -> tuple[list[float], float]:
        """The integral and the clock of its last sample; samples and gaps until now are counted in."""
        answer = self._sampler.mark(self._window)
        if answer is None:
            raise OSError(self._sampler.problem)
        if answer["why_no_power"]:
            raise OSError(answer["why_no_power"])
        return [answer["joules"]], answer["clock"]

    def note_quality(self) -> None:
        """Take in how densely the phase since the last edge was sampled."""
        answer = self._sampler.read()
        if answer is not None:
            window = answer["windows"][self._window]
            self.samples += window["samples"]
            self.longest_gap = max(self.longest_gap, window["longest_gap"])


Offer = tuple[str, EnergySource | None, str]


def offers(device: str, gpus: int, borrow: Callable[[Sequence[Any]], session.SamplerSession]) -> list[Offer]:
    """``(method, source or None, reason)`` of each method for this device, the best first.

    Args:
        device: ``cpu`` or ``cuda``.
        gpus: how many GPUs the job uses.
        borrow: gives the sampler of these GPUs; called only where it is needed.
    """
    if device != "cuda":
        return [_offer(RAPL, RaplCounter, "the processor's energy counter cannot be read")]
    used = session.used_gpus(gpus)
    if not used:
        reason = "the GPU's energy cannot be read (the driver names no visible GPU)"
        return [(method, None, reason) for method in (NVML_COUNTER, NVML_POWER_INTEGRAL)]
    if any(map(session.is_mig, used)):
        return [(method, None, MIG_HAS_NO_POWER) for method in (NVML_COUNTER, NVML_POWER_INTEGRAL)]
    uuids = [gpu.uuid for gpu in used]
    return [
        _offer(NVML_COUNTER, lambda: NvmlCounter(uuids), "the GPU's energy counter cannot be read"),
        _offer(NVML_POWER_INTEGRAL, lambda: PowerIntegral(borrow(used)), "the GPU's power cannot be sampled"),
    ]


def _offer(method: str, make: Callable[[], EnergySource], complaint: str) -> Offer:
    try:
        return method, make(), ""
    except (OSError, ValueError) as error:
        return method, None, f"{complaint} ({error})"
