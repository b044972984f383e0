"""Stops a run whose loss is no number any more, or has jumped, while the last good checkpoint is still the last."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from llm_at_home.training.callbacks.checkpoints import last_checkpoint


class Diverged(RuntimeError):
    """The loss or its gradient is no number, or the loss jumped; the message names the step and the checkpoint."""


class Divergence(Callback):
    """Looks at each optimizer step's loss and gradient norm, after the step log and before a checkpoint is saved.

    Under fp16 a gradient that overflows is usual: the scaler leaves that step out, so there only the loss is looked at.

    Args:
        spike: nats/token above the median of the last ``window`` steps that end the run; None for no limit.
        window: steps; nothing counts as a spike before there are as many.
    """

    def __init__(self, spike: float | None = 5.0, window: int = 20) -> None:
        self.spike = spike
        self.window = window
        self._seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Steps that a resumed run made before have been looked at."""
        self._seen = len(pl_module.history)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at the step if this micro-batch closed one.

        Raises:
            Diverged: to end the run.
        """
        if len(pl_module.history) == self._seen:
            return
        self._seen = len(pl_module.history)
        scaled = str(trainer.precision).startswith("16")
        why = self._complaint(pl_module.history, not scaled)
        if why is None:
            return
        step = int(pl_module.history[-1]["step"])
        checkpoint = last_checkpoint(Path(trainer.default_root_dir))
        left = (
            f"the last good checkpoint is {checkpoint.parent}" if checkpoint else "this run saved no checkpoint before"
        )
        raise Diverged(f"step {step}: {why}; {left}. Lower optimizer.lr, or look at the data of that step")

    def _complaint(self, history: list[dict[str, float]], gradients: bool) -> str | None:
        last = history[-1]
        if not math.isfinite(last["loss"]):
            return f"the loss is {last['loss']}"
        if gradients and not math.isfinite(last.get("gradient_norm", 0.0)):
            return f"the gradient's norm is {last['gradient_norm']}"
        before = [step["loss"] for step in history[-self.window - 1 : -1]]
        if self.spike is None or len(before) < self.window:
            return None
        usual = statistics.median(before)
        if last["loss"] > usual + self.spike:
            return f"the loss jumped from {usual:.3f} to {last['loss']:.3f} nats/token"
        return None
