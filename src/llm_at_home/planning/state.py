"""Gradients and optimizer state: what training keeps beside the weights, however long the sequences are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_at_home.errors import Refusal

# bitsandbytes keeps the moments of smaller tensors in float32, and one float32 scale for each 256 values of others. It
# pages the moments of tensors from a size on, and no scales.
SMALLEST_8BIT, BLOCK_8BIT = 4096, 256
SMALLEST_PAGED = 100_000
# AdaLoRA's scores: sensitivity, its moving average and that average's spread, in float32 (peft RankAllocator).
ADALORA_SCORES = 3


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes of an optimizer.

    Attributes:
        state: on the card, in torch's own memory.
        host: in the host's memory, or in unified memory, which moves there when the card is full; torch counts neither.
        step: further bytes while a step is made.
    """

    state: float
    host: float
    step: float


def optimizer_memory(optimizer: Mapping[str, Any], tensors: Counter[int], bytes_each: int) -> OptimizerMemory:
    """What ``optimizer=`` keeps for these trained tensors.

    Args:
        optimizer: the group.
        tensors: how many there are of each number of parameters.
        bytes_each: of a parameter; torch's own optimizers keep their state in its dtype.

    Raises:
        Refusal: for an optimizer that the planner does not know.
    """
    kind = str(optimizer["_target_"]).rpartition(".")[2]
    parameters = sum(size * count for size, count in tensors.items())
    if kind in ("AdamW", "Adam"):
        # torch makes the square roots of all second moments at once, unless one kernel does it all.
        step = 0.0 if optimizer.get("fused") else float(bytes_each * parameters)
        return OptimizerMemory(2.0 * bytes_each * parameters, 0.0, step)
    if kind == "SGD":
        return OptimizerMemory(float(bytes_each * parameters) if optimizer.get("momentum") else 0.0, 0.0, 0.0)
    if kind == "HostAdamW":
        return OptimizerMemory(0.0, 12.0 * parameters, 0.0)  # weight and moments in float32, always
    if kind in ("AdamW8bit", "PagedAdamW8bit"):
        small, large = (
            sum(size * count for size, count in tensors.items() if low <= size < high)
            for low, high in ((0, SMALLEST_8BIT), (SMALLEST_PAGED, math.inf))
        )
        state = 8.0 * small + (parameters - small) * (2 + 2 * 4 / BLOCK_8BIT)
        paged = 2.0 * large if kind.startswith("Paged") else 0.0
        return OptimizerMemory(state - paged, paged, 0.0)
    raise Refusal(f"optimizer={kind} is unknown to the planner: use one of conf/optimizer")
