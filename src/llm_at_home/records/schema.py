"""The run record: what one run leaves behind, and the readings that it holds."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 2

STATUSES = ("ok", "out_of_memory", "failed", "timed_out", "interrupted")
DONE = ("ok", "out_of_memory")  # what does not fit is an answer as well


@dataclass(frozen=True)
class Reading:
    """One measured figure, or the reason why there is none.

    Args:
        value: the figure, or None when it is unknown; never 0 for unknown.
        unit: the field's unit (``GB`` is 10^9 bytes, ``Wh``, ``J/token``, ``tokens/s``, ``s``, ``1``).
        method: how it was obtained (``nvml_counter``, ``torch_peak``, ``synchronized_clock``, ...).
        interval95: lower and upper end of the 95 % interval, in the same unit.
        n: the number of observations behind the value.
        reason: why the value is None; required then, and only then allowed to replace it.

    Raises:
        ValueError: for a value that is not finite, or an interval that is not, or an unknown without a reason.
    """

    value: float | None
    unit: str
    method: str
    interval95: tuple[float, float] | None = None
    n: int | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.value is None and not self.reason:
            raise ValueError("a reading without a value must say why")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"{self.value} is no reading: give None and a reason")
        if self.interval95 is not None and not all(map(math.isfinite, self.interval95)):
            raise ValueError(f"{self.interval95} is no interval: give None")

    @classmethod
    def unknown(cls, unit: str, reason: str, method: str = "none") -> Reading:
        """A figure that could not be had, with the reason in one line."""
        return cls(value=None, unit=unit, method=method, reason=reason)


@dataclass
class Record:
    """What one run leaves in ``record.json``; every key is always present.

    ``readings`` are costs (memory, speed, energy), ``quality`` is worth (scores, exact match, perplexity);
    both map the field's name of a figure to a :class:`Reading`. ``counts`` holds whole numbers about the data
    (truncated conversations, missing judgments). ``subject`` names the run that an evaluation is about:
    ``{"folder", "config_hash", "task", "config"}``. ``kernel`` names the linear layers that really ran;
    ``adapter`` holds what became of an adapter and is no figure (``rank_pattern``: the rank of each matrix).
    """

    task: str
    status: str = "ok"
    config: dict[str, Any] = field(default_factory=dict)
    config_hash: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    kernel: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    readings: dict[str, Reading] = field(default_factory=dict)
    quality: dict[str, Reading] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    subject: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status {self.status!r} is none of {', '.join(STATUSES)}")

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        """Rebuild a record from :meth:`to_dict`.

        Raises:
            ValueError: when the schema version is newer than this package, or a key is unknown.
        """
        if data.get("schema_version", 0) > SCHEMA_VERSION:
            raise ValueError(f"record schema {data['schema_version']} is newer than this package's {SCHEMA_VERSION}")
        names = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - names)
        if unknown:
            raise ValueError(f"unknown keys in the record: {', '.join(unknown)}")
        data = dict(data)
        for group in ("readings", "quality"):
            data[group] = {name: _reading(value) for name, value in data.get(group, {}).items()}
        return cls(**data)


def _reading(data: dict[str, Any]) -> Reading:
    interval = data.get("interval95")
    return Reading(**{**data, "interval95": tuple(interval) if interval else None})
