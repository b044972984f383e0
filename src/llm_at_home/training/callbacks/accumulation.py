"""Gradient accumulation: one optimizer step for several micro-batches."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler


class GradientAccumulation(GradientAccumulationScheduler):
    """Accumulate over ``steps`` micro-batches; the module divides by the tokens of them all.

    Args:
        steps: micro-batches in an optimizer step.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(scheduling={0: steps})
        self.steps = steps

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Set the number here too: Lightning sets it when a pass begins, which a run resumed inside one never sees."""
        super().on_train_start(trainer, pl_module)
        trainer.accumulate_grad_batches = self.get_accumulate_grad_batches(trainer.current_epoch)
