"""SIGINT and SIGTERM end a run at an optimizer-step boundary, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, Trainer

from llm_at_home.errors import Interrupted
from llm_at_home.training.callbacks.checkpoints import Checkpoints

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(Callback):
    """Finish the open accumulation window, save a checkpoint, and raise :class:`llm_at_home.errors.Interrupted`."""

    def __init__(self) -> None:
        self._asked: int | None = None
        self._step = 0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the signals over from Lightning, whose handlers stop in the middle of a window."""
        self._step = trainer.global_step
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = number

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop here if asked to and the window is closed."""
        closed = trainer.global_step > self._step
        self._step = trainer.global_step
        # A signal reaches several processes at different steps, and a step is made by all of them or none.
        if not closed or not trainer.strategy.reduce_boolean_decision(self._asked is not None, all=False):
            return
        self._asked = self._asked or signal.SIGTERM
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        saved = [callback.save(trainer, pl_module) for callback in callbacks if isinstance(callback, Checkpoints)]
        where = f"; its checkpoint is {saved[0]}" if saved and saved[0] else ""
        raise Interrupted(f"{signal.Signals(self._asked).name} after optimizer step {trainer.global_step}{where}")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give the signals back."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
