"""Peak memory of a training run, by its several names."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer

from llm_at_home.metering.memory import MemoryMeter
from llm_at_home.records.schema import Reading


class PeakMemory(Callback):
    """Peaks since the model began to load (``before_load`` is called then) and over the training steps alone."""

    def __init__(self) -> None:
        self._meter: MemoryMeter | None = None

    def before_load(self, device: str) -> None:
        """Begin to count, before anything is loaded onto ``device``."""
        self.close()
        self._meter = MemoryMeter(device)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """The measured phase begins."""
        if self._meter is not None:
            self._meter.begin_measured()

    def readings(self) -> dict[str, Reading]:
        """The peaks, each under its own name; also after :meth:`close`, which stops the driver's figures."""
        return self._meter.readings() if self._meter is not None else {}

    def close(self) -> None:
        """Let go of the sampler."""
        if self._meter is not None:
            self._meter.close()
