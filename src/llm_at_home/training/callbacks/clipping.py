"""Gradient clipping by norm, and how often it acted."""

from __future__ import annotations

import math
import statistics
from typing import Any

from lightning.pytorch import Callback, Trainer

from llm_at_home.records.schema import Reading
from llm_at_home.training.module import CausalLMModule


class GradientClipping(Callback):
    """Clip the accumulated gradient to ``max_norm``; the module measures the norm before clipping.

    Args:
        max_norm: the largest 2-norm that passes unchanged.
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm
        self._history: list[dict[str, float]] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Tell Lightning the threshold; it calls the module's clipping with it."""
        trainer.gradient_clip_val = self.max_norm

    def on_fit_start(self, trainer: Trainer, pl_module: CausalLMModule) -> None:  # type: ignore[override]
        """Know where the module keeps the norms that it measures, also those of a run that ends early."""
        self._history = pl_module.history

    def readings(self) -> dict[str, Reading]:
        """``gradient_norm_median`` before clipping and ``clipped_share``, the share of steps that were clipped."""
        norms = [step["gradient_norm"] for step in self._history if math.isfinite(step.get("gradient_norm", math.nan))]
        if not norms:
            names = ("gradient_norm_median", "clipped_share")
            return {name: Reading.unknown("1", "no gradient was clipped or measured") for name in names}
        clipped = sum(norm > self.max_norm for norm in norms) / len(norms)
        return {
            "gradient_norm_median": Reading(statistics.median(norms), "1", "2_norm_before_clipping", n=len(norms)),
            "clipped_share": Reading(clipped, "1", f"norm_above_{self.max_norm:g}", n=len(norms)),
        }
