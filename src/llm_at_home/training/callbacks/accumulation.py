"""Gradient accumulation: one optimizer step for several micro-batches, as many as a schedule says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, Trainer

from llm_at_home.training.accumulation_schedule import accumulation_schedule


class GradientAccumulation(Callback):
    """Accumulate over ``steps`` micro-batches; the module divides by the tokens of them all.

    Lightning's own scheduler counts passes over the data, of which a run may not even make one; this counts optimizer
    steps. A pass over the data ends its last window, which may so be smaller.

    Args:
        steps: micro-batches in an optimizer step, or a schedule of them by optimizer step: ``{0: 8, 100: 4}``.

    Raises:
        Refusal: for a schedule that is none.
    """

    def __init__(self, steps: int | Mapping[int, int]) -> None:
        self.schedule = accumulation_schedule(steps)
        self._step: int | None = None

    def micro_batches(self, step: int) -> int:
        """In the window that makes the optimizer step after ``step`` steps."""
        return self.schedule[max(start for start in self.schedule if start <= step)]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """No window is open, also where a resumed run goes on inside a pass."""
        self._step = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Say where the window ends that this micro-batch opens, if it opens one.

        Lightning steps after micro-batches whose number in the pass is a multiple of its own: the number of the last
        one in this window is the first such multiple. The module takes the division by it back, and lets gradients go.
        """
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            trainer.accumulate_grad_batches = batch_idx + self.micro_batches(self._step)
