"""From what tensors take to what the card shows: cuBLAS, the caching allocator's gaps, and the CUDA context.

These follow from no shape. ``measured.yaml`` holds the constants, how they were fitted, and which records were used.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOPPER = (9, 0)
# torch gives cuBLAS a workspace for each thread that multiplies: the forward and the backward pass's.
CUBLAS_WORKSPACE = {"hopper": 32 * 2**20, "other": 4096 * 1024 * 2 + 16 * 1024 * 8}


@functools.cache
def constants() -> dict[str, Any]:
    """What was fitted, by name."""
    import yaml

    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("measured.yaml").read_text(encoding="utf-8"))
    return found


def cublas_workspace(capability: tuple[int, int], threads: int) -> float:
    """Bytes that cuBLAS works in.

    Args:
        capability: the card's compute capability.
        threads: that multiply: 2 in training, 1 in inference.
    """
    return float(threads * CUBLAS_WORKSPACE["hopper" if capability >= HOPPER else "other"])


@dataclass(frozen=True)
class Gaps:
    """What the caching allocator reserves beyond the tensors: a share of those that come and go, and a constant.

    Attributes:
        constant: bytes.
        share: of activations and logits, or of keys and values.
    """

    constant: float
    share: float

    @classmethod
    def of(cls, task: str) -> Gaps:
        """As fitted for ``train`` or ``infer``."""
        found = constants()["reserved_beyond_allocated"][task]
        return cls(found["constant_gb"] * 1e9, found["share"])

    def bytes(self, moving: float) -> float:
        """For so many bytes of tensors that come and go."""
        return self.constant + self.share * moving


def context_bytes(task: str) -> float:
    """Bytes of the CUDA context and the kernels loaded into it, which the process has and torch does not count."""
    return float(constants()["context_gb"][task] * 1e9)
