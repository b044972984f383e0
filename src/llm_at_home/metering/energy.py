"""Energy by a hardware counter: the GPU's (NVML) or the processor package's (RAPL); else unknown, with the reason."""

from __future__ import annotations

import threading
import time
import weakref
from pathlib import Path
from typing import Protocol

from llm_at_home.records.schema import Reading

RAPL_ROOT = Path("/sys/class/powercap")
# The smallest RAPL counters wrap around after 65 kJ: at 1 kW that is a minute.
RAPL_READ_SECONDS = 60.0


class EnergyCounter(Protocol):
    """A counter that only grows. ``joules()`` is its value now; ``method`` names it in the reading."""

    method: str

    def joules(self) -> float:
        """The counter's value in joules."""
        ...


class NvmlCounter:
    """``nvmlDeviceGetTotalEnergyConsumption`` (mJ since the driver was loaded; Volta and later) of the GPUs in use."""

    method = "nvml_counter"

    def __init__(self, uuids: list[str]) -> None:
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        self._handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        self.joules()  # a GPU without the counter fails here, not in the middle of a run

    def joules(self) -> float:
        """Sum over the GPUs, in joules.

        Raises:
            OSError: when the driver does not give the counter (any more).
        """
        try:
            return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles) / 1000
        except self._nvml.NVMLError as error:
            raise OSError(str(error)) from error


class RaplCounter:
    """Intel/AMD package counters of the powercap interface (microjoules), corrected for their wrap-around.

    A thread reads them every minute, so that no wrap-around is missed in a long run.
    """

    method = "rapl"

    def __init__(self, root: Path | None = None) -> None:
        zones = [zone for zone in sorted((root or RAPL_ROOT).glob("intel-rapl:*")) if zone.name.count(":") == 1]
        # A laptop's "psys" zone is the whole platform and holds the package a second time.
        self._zones = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
        if not self._zones:
            raise OSError("no RAPL counter is exposed by this machine")
        self._range = [int((zone / "max_energy_range_uj").read_text()) for zone in self._zones]
        self._last = [self._read(zone) for zone in self._zones]
        self._total = 0.0
        self._lock = threading.Lock()
        threading.Thread(target=_keep_reading, args=(weakref.ref(self),), daemon=True).start()

    @staticmethod
    def _read(zone: Path) -> int:
        return int((zone / "energy_uj").read_text())

    def joules(self) -> float:
        """Sum over the packages since this object was made, in joules."""
        with self._lock:
            for i, zone in enumerate(self._zones):
                value = self._read(zone)
                self._total += (value - self._last[i]) % (self._range[i] + 1)
                self._last[i] = value
            return self._total / 1e6


def _keep_reading(reference: weakref.ref[RaplCounter]) -> None:
    while True:
        time.sleep(RAPL_READ_SECONDS)
        counter = reference()
        if counter is None:
            return
        try:
            counter.joules()
        except (OSError, ValueError):
            return  # whoever asks next sees the error
        del counter


def open_counter(device: str) -> tuple[EnergyCounter | None, str]:
    """The counter for this device and, where there is none, the reason in one line."""
    if device == "cuda":
        import pynvml

        from llm_at_home.hardware.present import present_gpus

        if not present_gpus():
            return None, "the GPU's energy counter cannot be read (the driver names no visible GPU)"
        try:
            return NvmlCounter([gpu.uuid for gpu in present_gpus()[:1]]), ""
        except (OSError, pynvml.NVMLError) as error:
            return None, f"the GPU's energy counter cannot be read ({error})"
    try:
        return RaplCounter(), ""
    except (OSError, ValueError) as error:
        return None, f"the processor's energy counter cannot be read ({error})"


class EnergyMeter:
    """Energy between ``start()`` and ``stop()``, and per unit of work.

    Args:
        device: ``cpu`` or ``cuda``.
        idle_seconds: length of the idle baseline of :meth:`measure_idle`; without a counter nothing is waited for.
    """

    def __init__(self, device: str, idle_seconds: float = 5.0) -> None:
        self.counter, self.reason = open_counter(device)
        self.idle_seconds = idle_seconds
        self._idle_watts: float | None = None
        self._joules = 0.0
        self._seconds = 0.0
        self._edge: tuple[float, float] | None = None

    def measure_idle(self) -> None:
        """Take the idle baseline (W); call it with the model loaded and the device at rest."""
        if self.counter is None:
            return
        start, clock = self._now()
        time.sleep(self.idle_seconds)
        end, later = self._now()
        self._idle_watts = (end - start) / (later - clock)

    def start(self) -> None:
        """Begin or go on counting."""
        if self.counter is not None:
            self._edge = self._now()

    def stop(self) -> None:
        """Stop counting; several start/stop pairs add up. Without a ``start()`` it does nothing."""
        if self.counter is not None and self._edge is not None:
            joules, clock = self._now()
            self._joules += joules - self._edge[0]
            self._seconds += clock - self._edge[1]
            self._edge = None

    def _now(self) -> tuple[float, float]:
        """The counter (J) and the clock (s); a counter that fails in the middle of a run makes its energy unknown."""
        joules = 0.0
        if self.counter is not None:
            try:
                joules = self.counter.joules()
            except (OSError, ValueError) as error:
                self.counter, self.reason = None, f"the energy counter failed during the run ({error})"
        return joules, time.perf_counter()

    def readings(self, per: str, amount: int) -> dict[str, Reading]:
        """Gross and net energy in Wh, and gross joules for each of ``amount`` units of work named ``per``.

        Net is gross less the idle power times the time; it is unknown where no idle baseline was taken.
        """
        names = {"energy_gross": "Wh", "energy_net": "Wh", f"energy_per_{per}": f"J/{per}"}
        # A virtual machine may show a counter that never moves: that is no measurement, and neither is no start().
        reason = self.reason if self.counter is None else "" if self._joules > 0 else "the counter did not move"
        if self.counter is None or reason:
            return {name: Reading.unknown(unit, reason) for name, unit in names.items()}
        method = self.counter.method
        figures = {"energy_gross": Reading(self._joules / 3600, "Wh", method)}
        if self._idle_watts is None:
            figures["energy_net"] = Reading.unknown("Wh", "no idle baseline was taken", method)
        else:
            net = self._joules - self._idle_watts * self._seconds
            figures["energy_net"] = Reading(net / 3600, "Wh", method)
            figures["idle_power"] = Reading(self._idle_watts, "W", method)
        if amount > 0:
            figures[f"energy_per_{per}"] = Reading(self._joules / amount, f"J/{per}", method)
        else:
            figures[f"energy_per_{per}"] = Reading.unknown(f"J/{per}", f"no {per} was made", method)
        return figures
