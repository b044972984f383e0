"""The log of optimizer steps: ``metrics.csv`` in the run folder, and the same in MLflow. Every run has it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from llm_at_home.records.tracking import Tracker

COLUMNS = ("step", "loss", "tokens", "input_tokens", "gradient_norm", "lr")


class StepLog(Callback):
    """Closes the module's accumulation window after each optimizer step and writes its figures down.

    Args:
        folder: the run folder; None where nothing is written.
        tracker: MLflow, or None.
    """

    def __init__(self, folder: Path | None, tracker: Tracker | None) -> None:
        self.path = folder / "metrics.csv" if folder else None
        self.tracker = tracker
        self._step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin the file, with the steps that a resumed run made before, which may be all."""
        if self.path is not None:
            with self.path.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(pl_module.history)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Count steps from where this run begins, which after a resume is not zero."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the step down if this micro-batch closed one."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        figures = pl_module.close_window()
        if self.path is not None:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, COLUMNS).writerow(figures)
        if self.tracker is not None:
            shown = {key: figures[key] for key in ("loss", "gradient_norm", "lr") if key in figures}
            self.tracker.log_step(shown, int(figures["step"]))
