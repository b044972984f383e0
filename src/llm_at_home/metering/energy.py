"""Energy of a phase by every method that the device offers; the best that worked is the figure, else it is unknown."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from llm_at_home.metering import session
from llm_at_home.metering.sources import NVML_COUNTER, NVML_POWER_INTEGRAL, EnergySource, PowerIntegral, offers
from llm_at_home.records.schema import Reading

# Power is a one-second average on recent cards: what ran just before the idle baseline would still be in it.
SETTLE_SECONDS = 1.5
DIVERGENCE_LIMIT = 0.10
GAP_LIMIT = 1.0


class EnergyMeter:
    """Energy between ``start()`` and ``stop()``, and per unit of work.

    On a GPU both methods run side by side (the driver's energy counter, and the integral of sampled power), so that
    one can stand in for the other and check it. Close it, or use it as a context manager: the sampler ends then.

    Args:
        device: ``cpu`` or ``cuda``.
        idle_seconds: length of the idle baseline of :meth:`measure_idle`; without a meter nothing is waited for.
        gpus: how many GPUs the job uses: the first visible ones.
    """

    def __init__(self, device: str, idle_seconds: float = 5.0, gpus: int = 1) -> None:
        self.device, self.idle_seconds = device, idle_seconds
        self._sampler: session.SamplerSession | None = None
        self._tallies = [_Tally(*offer) for offer in offers(device, gpus, self._borrow)]

    def _borrow(self, gpus: Sequence[Any]) -> session.SamplerSession:
        self._sampler = session.borrow(gpus)
        return self._sampler

    def __enter__(self) -> EnergyMeter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop counting and let go of the sampler; readings can still be had, and a second time does nothing."""
        self.stop()
        if self._sampler is not None:
            session.give_back(self._sampler)
            self._sampler = None

    def measure_idle(self) -> None:
        """Take the idle baseline (W); call it with the model loaded, the CUDA context alive and the device at rest."""
        if all(tally.source is None for tally in self._tallies):
            return
        _synchronize()
        if self.device == "cuda":
            time.sleep(SETTLE_SECONDS)
        if self._sampler is not None:
            self._sampler.wait_until_calibrated()  # which asks the driver a thousand times a second
        for tally in self._tallies:
            tally.begin()
        time.sleep(self.idle_seconds)
        for tally in self._tallies:
            tally.end_idle()

    def start(self) -> None:
        """Begin or go on counting, after the device has done what it was given."""
        _synchronize()
        for tally in self._tallies:
            tally.begin()

    def stop(self) -> None:
        """Stop counting; several start/stop pairs add up. Without a ``start()`` it does nothing."""
        if any(tally.running for tally in self._tallies):
            _synchronize()
        for tally in self._tallies:
            tally.end()

    def readings(self, per: str, amount: int) -> dict[str, Reading]:
        """Gross and net energy in Wh, and joules, gross and net, for each of ``amount`` units of work named ``per``.

        ``energy_gross``, ``energy_net`` (gross less the idle power times the time; unknown without an idle baseline),
        ``energy_per_{per}``, ``energy_per_{per}_net`` and ``idle_power`` (W) are by the best method that worked. On a
        GPU ``energy_methods_divergence`` is by which share the power integral lies above the counter, and
        ``energy_gross_power_integral`` the integral itself where the counter is the main method.
        """
        main = self._main()
        if main is None:
            reason = "; ".join(dict.fromkeys(tally.why_unknown() for tally in self._tallies))
            units = {"energy_gross": "Wh", "energy_net": "Wh"}
            units |= {name: f"J/{per}" for name in (f"energy_per_{per}", f"energy_per_{per}_net")}
            return {name: Reading.unknown(unit, reason) for name, unit in units.items()}
        figures = {"energy_gross": Reading(main.joules / 3600, "Wh", main.method, n=main.samples)}
        net, why_no_net = main.net()
        figures["energy_net"] = _reading(None if net is None else net / 3600, "Wh", main.method, why_no_net)
        if main.idle_watts is not None:
            figures["idle_power"] = Reading(main.idle_watts, "W", main.method)
        for name, joules, why in ((f"energy_per_{per}", main.joules, ""), (f"energy_per_{per}_net", net, why_no_net)):
            share = None if joules is None or amount <= 0 else joules / amount
            figures[name] = _reading(share, f"J/{per}", main.method, f"no {per} was made" if amount <= 0 else why)
        return figures | self._second_opinion(main)

    @property
    def flags(self) -> list[str]:
        """What a reader of the record should know about these readings, a line each; usually nothing."""
        lines = []
        main, divergence = self._main(), self._divergence()
        if divergence is not None and abs(divergence) > DIVERGENCE_LIMIT and main is not None:
            lines.append(
                f"energy: the two GPU methods differ by {divergence:+.0%} over {main.seconds:.1f} s "
                f"(limit {DIVERGENCE_LIMIT:.0%}); short phases differ because power is averaged over a second"
            )
        counter, integral = self._tally(NVML_COUNTER), self._tally(NVML_POWER_INTEGRAL)
        if counter is not None and counter.offered and main is integral and main is not None:
            lines.append(
                f"energy: {counter.method} was offered, but {counter.why_unknown()}; the power integral is used"
            )
        gap = integral.source.longest_gap if integral and isinstance(integral.source, PowerIntegral) else 0.0
        if gap > GAP_LIMIT:
            lines.append(f"energy: power was not sampled for {gap:.1f} s on end")
        return lines

    def _tally(self, method: str) -> _Tally | None:
        return next((tally for tally in self._tallies if tally.method == method), None)

    def _main(self) -> _Tally | None:
        return next((tally for tally in self._tallies if not tally.why_unknown()), None)

    def _divergence(self) -> float | None:
        counter, integral = self._tally(NVML_COUNTER), self._tally(NVML_POWER_INTEGRAL)
        if counter is None or integral is None or counter.why_unknown() or integral.why_unknown():
            return None
        # Each by its own clock: the edges of the two are not at the same instant, which counts in a short phase.
        return (integral.joules / integral.seconds) / (counter.joules / counter.seconds) - 1

    def _second_opinion(self, main: _Tally) -> dict[str, Reading]:
        counter, integral = self._tally(NVML_COUNTER), self._tally(NVML_POWER_INTEGRAL)
        if counter is None or integral is None:
            return {}
        figures = {}
        reason = counter.why_unknown() or integral.why_unknown()
        if main is counter:
            value = None if reason else integral.joules / 3600
            figures["energy_gross_power_integral"] = _reading(
                value, "Wh", integral.method, reason, None if reason else integral.samples
            )
        figures["energy_methods_divergence"] = _reading(self._divergence(), "1", "power_integral_over_counter", reason)
        return figures


class _Tally:
    """What one method has counted: joules and seconds between edges, and idle watts."""

    def __init__(self, method: str, source: EnergySource | None, reason: str) -> None:
        self.method, self.source, self.reason = method, source, reason
        self.offered = source is not None
        self.idle_watts: float | None = None
        self.seconds = 0.0
        self.parts: list[float] = []  # joules of each GPU
        self._begin: tuple[list[float], float] | None = None

    @property
    def running(self) -> bool:
        return self._begin is not None

    @property
    def joules(self) -> float:
        return sum(self.parts)

    @property
    def samples(self) -> int | None:
        return self.source.samples if isinstance(self.source, PowerIntegral) else None

    def why_unknown(self) -> str:
        """Why there is no figure; "" where there is one. A counter that stands still is no measurement of zero."""
        if self.source is None:
            return self.reason
        return "" if self.parts and all(part > 0 for part in self.parts) else "the counter did not move"

    def net(self) -> tuple[float | None, str]:
        if self.idle_watts is None:
            return None, "no idle baseline was taken"
        return self.joules - self.idle_watts * self.seconds, ""

    def begin(self) -> None:
        self._begin = self._edge()

    def end(self) -> None:
        if self._begin is None:
            return
        if isinstance(self.source, PowerIntegral):
            self.source.note_quality()
        parts, seconds = self._since_begin()
        self.parts = [a + b for a, b in zip(self.parts or [0.0] * len(parts), parts, strict=False)]
        self.seconds += seconds

    def end_idle(self) -> None:
        if self._begin is None:
            return
        parts, seconds = self._since_begin()
        if parts and all(part > 0 for part in parts) and seconds > 0:
            self.idle_watts = sum(parts) / seconds

    def _since_begin(self) -> tuple[list[float], float]:
        begin, end = self._begin, self._edge()
        self._begin = None
        if begin is None or end is None:
            return [], 0.0
        return [b - a for a, b in zip(begin[0], end[0], strict=True)], end[1] - begin[1]

    def _edge(self) -> tuple[list[float], float] | None:
        """The source's edge; a source that fails in the middle of a run makes its energy unknown."""
        if self.source is None:
            return None
        try:
            return self.source.edge()
        except (OSError, ValueError) as error:
            self.source, self.reason = None, f"it failed during the run ({error})"
            return None


def _reading(value: float | None, unit: str, method: str, reason: str, n: int | None = None) -> Reading:
    return Reading.unknown(unit, reason, method) if value is None else Reading(value, unit, method, n=n)


def _synchronize() -> None:
    """Wait for the device where torch drives one: energy belongs to the work, not to the moment it was handed over."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        # A device that has failed says so again here, in the place of the error that ended the run.
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
