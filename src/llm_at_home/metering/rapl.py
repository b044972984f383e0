"""Energy of the processor package by RAPL, as the kernel's powercap interface gives it."""

from __future__ import annotations

import threading
import time
import weakref
from pathlib import Path

RAPL_ROOT = Path("/sys/class/powercap")
# The smallest RAPL counters wrap around after 65 kJ: at 1 kW that is a minute.
RAPL_READ_SECONDS = 60.0


class RaplCounter:
    """Intel/AMD package counters of the powercap interface (microjoules), corrected for their wrap-around.

    A thread reads them every minute, so that no wrap-around is missed in a long run.

    Raises:
        OSError: when there is no package counter, or it may not be read.
        ValueError: when it holds no number.
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

    def edge(self) -> tuple[list[float], float]:
        """The counter (J, as one figure) and the clock (s)."""
        return [self.joules()], time.perf_counter()


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
