"""What a prediction is: the memory of each moment of a run by parts, and which moment is the peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# In the order in which they are shown.
PARTS = (
    *("weights", "adapter", "gradients", "optimizer", "activations", "logits", "keys and values", "workspace"),
    "fragmentation",
)
METHOD = "predicted"


@dataclass(frozen=True)
class Moment:
    """One moment at which memory may be at its peak.

    Attributes:
        name: in a few words.
        parts: bytes by part; what a part's name is not in is not there.
        moving: of those, what comes and goes, which leaves gaps in the allocator.
    """

    name: str
    parts: Mapping[str, float]
    moving: float

    @property
    def allocated(self) -> float:
        """Bytes of tensors."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Prediction:
    """Peaks in bytes.

    Attributes:
        parts: of the peak, by name; they add up to ``reserved``.
        allocated: torch's ``torch_allocated_peak``.
        reserved: ``torch_reserved_peak``.
        process: ``process_memory_peak``, the CUDA context included.
        moment: which moment is the peak.
        moving: what comes and goes, at the moment that has most of it.
        host: what waits in the host's memory: paged or offloaded.
        trained: parameters that take gradients.
        notes: what the figures leave out, or were not measured on.
    """

    parts: Mapping[str, float]
    allocated: float
    reserved: float
    process: float
    moment: str
    moving: float
    host: float = 0.0
    trained: int = 0
    notes: tuple[str, ...] = field(default=())

    def fits(self, memory: float | None) -> bool | None:
        """Whether the process fits a card of so many GB; None where that is not known."""
        return None if memory is None else self.process <= memory * 1e9
