"""Effects with their 95 % intervals: of one figure, and of two figures whose own intervals the records hold.

Where no paired comparison exists the interval of a difference or a ratio is recovered from the two of the figures
(MOVER: Zou and Donner 2008, "Construction of confidence limits about effect measures", Statistics in Medicine 27;
ratios on the logarithmic scale). It assumes that the two estimates are independent; for runs on the same questions it
is too wide rather than too narrow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llm_at_home.records.schema import Reading, Record

Interval = tuple[float, float]

# Counts of bytes and of weights: one configuration gives the same in every run, so that a single one is exact.
EXACT = (
    *("torch_allocated_peak", "measured_torch_allocated_peak", "model_size", "checkpoint_size"),
    *("bits_per_weight", "bits_per_weight_whole_model", "bits_per_weight_on_disk", "trainable_parameters"),
)


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval, both in ``unit``; ``interval`` None with the reason in ``reason``."""

    value: float
    unit: str
    interval: Interval | None
    reason: str = ""


def of_record(record: Record, figure: str, per: str | None = None) -> Estimate | str:
    """A record's figure, or why there is none."""
    found = {**record.readings, **record.quality}
    estimate = _of_reading(found.get(figure), figure)
    if per is None or isinstance(estimate, str):
        return estimate
    divisor = _of_reading(found.get(per), per)
    if isinstance(divisor, str):
        return divisor
    return ratio(estimate, divisor)


def _of_reading(reading: Reading | None, figure: str) -> Estimate | str:
    if reading is None:
        return f"the record holds no {figure}"
    if reading.value is None:
        return f"{figure} is unknown: {reading.reason}"
    if figure in EXACT:
        return Estimate(reading.value, reading.unit, (reading.value, reading.value))
    ends = reading.interval95
    if ends is None:
        n = f"n = {reading.n}" if reading.n else "one run"
        return Estimate(reading.value, reading.unit, None, f"{figure} has no interval ({n})")
    if ends[0] == ends[1]:
        # Draws of equal observations are all equal, and say nothing of what others would have been.
        return Estimate(reading.value, reading.unit, None, f"every observation of {figure} is the same")
    return Estimate(reading.value, reading.unit, ends)


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b, of two independent estimates."""
    value, why = a.value - b.value, a.reason or b.reason
    if a.interval is None or b.interval is None:
        return Estimate(value, a.unit, None, why)
    below = math.hypot(a.value - a.interval[0], b.interval[1] - b.value)
    above = math.hypot(a.interval[1] - a.value, b.value - b.interval[0])
    return Estimate(value, a.unit, (value - below, value + above))


def ratio(a: Estimate, b: Estimate) -> Estimate | str:
    """a / b, of two independent estimates of what cannot be negative.

    An interval that reaches zero (two passes give such) leaves the ratio without a lower or an upper end: the end is
    then 0 or infinity.
    """
    if a.value <= 0 or b.value <= 0:
        return "a ratio needs two figures above zero"
    value, unit = a.value / b.value, "1" if a.unit == b.unit else f"{a.unit}/{b.unit}"
    if a.interval is None or b.interval is None:
        return Estimate(value, unit, None, a.reason or b.reason)
    below = math.hypot(_log(a.value, a.interval[0]), _log(b.interval[1], b.value))
    above = math.hypot(_log(a.interval[1], a.value), _log(b.value, b.interval[0]))
    return Estimate(value, unit, (value * math.exp(-below), value * math.exp(above)))


def _log(larger: float, smaller: float) -> float:
    return math.log(larger / smaller) if smaller > 0 else math.inf
