"""Progress on the terminal: a bar with the run's figures, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, Trainer


class Progress(Callback):
    """Shows step, loss, gradient norm, tokens/s and steps/s.

    Args:
        lines: how many plain lines a run prints where the output is no terminal.
    """

    def __init__(self, lines: int = 10) -> None:
        self.lines = lines
        self._bar: Any = None
        self._task: Any = None
        self._seen = 0
        self._start = (0.0, 0)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Open the bar."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        self._start = (time.perf_counter(), trainer.global_step)
        self._seen = len(pl_module.history)
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
            )
            self._bar.start()
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self._task = self._bar.add_task("train", total=total, completed=trainer.global_step, figures="")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Show the step that was just closed, if one was."""
        if len(pl_module.history) == self._seen:
            return
        self._seen = len(pl_module.history)
        last = pl_module.history[-1]
        elapsed = time.perf_counter() - self._start[0]
        steps = trainer.global_step - self._start[1]
        tokens = sum(step["input_tokens"] for step in pl_module.history[-steps:])
        figures = f"loss {last['loss']:.3f}  {steps / elapsed:.2f} steps/s  {tokens / elapsed:.0f} tokens/s"
        if "gradient_norm" in last:
            figures += f"  norm {last['gradient_norm']:.2f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, figures=figures)
        elif self._is_line(trainer):
            self._console.print(f"step {trainer.global_step}/{trainer.max_steps}  {figures}", highlight=False)

    def _is_line(self, trainer: Trainer) -> bool:
        step, every = trainer.global_step, max(1, trainer.max_steps // self.lines)
        return step - self._start[1] == 1 or step % every == 0 or step == trainer.max_steps

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Close the bar."""
        self._close()
