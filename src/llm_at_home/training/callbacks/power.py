"""Power metering: the energy of the training steps."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer

from llm_at_home.metering.energy import EnergyMeter
from llm_at_home.records.schema import Reading


class PowerMeter(Callback):
    """Energy from the first step to the last, in all and for each optimizer step, by the best method there is.

    Args:
        idle_seconds: length of the idle baseline, taken with the model loaded; skipped where there is no meter.
    """

    def __init__(self, idle_seconds: float = 5.0) -> None:
        self.idle_seconds = idle_seconds
        self._meter: EnergyMeter | None = None
        self._first_step = 0
        self._steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the idle baseline and begin to count."""
        self.close()
        self._meter = EnergyMeter(pl_module.device.type, self.idle_seconds)
        self._meter.measure_idle()
        self._first_step, self._steps = trainer.global_step, 0
        self._meter.start()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Stop counting."""
        self._stop(trainer)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Stop counting; the steps until then have their energy."""
        self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        if self._meter is not None:
            self._meter.stop()
            self._steps = trainer.global_step - self._first_step

    def readings(self) -> dict[str, Reading]:
        """``energy_gross``, ``energy_net`` (Wh), ``energy_per_step``, ``energy_per_step_net`` (J/step) and more."""
        return self._meter.readings("step", self._steps) if self._meter is not None else {}

    @property
    def flags(self) -> list[str]:
        """What a reader of the record should know about these readings, a line each."""
        return self._meter.flags if self._meter is not None else []

    def close(self) -> None:
        """Let go of the sampler; readings can still be had."""
        if self._meter is not None:
            self._meter.close()
