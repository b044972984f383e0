"""Training speed: optimizer steps and tokens a second."""

from __future__ import annotations

import statistics
from typing import Any

from lightning.pytorch import Callback, Trainer

from llm_at_home.metering.timing import mean_interval95, now
from llm_at_home.records.schema import Reading
from llm_at_home.training.counting import pairs_in, tokens_in


class Throughput(Callback):
    """Times each optimizer step between device-synchronised edges.

    A step runs from the start of its first micro-batch to the end of its last, so that checkpoints and logging between
    steps do not count.

    Args:
        warmup_steps: first steps left out of the figures; their time is given by itself.
    """

    def __init__(self, warmup_steps: int = 1) -> None:
        self.warmup_steps = warmup_steps
        self.seconds: list[float] = []
        self._tokens: list[float] = []
        self._pairs: list[float] = []
        self._edge: float | None = None
        self._window_tokens = self._window_pairs = 0.0
        self.first_step_end: float | None = None  # on the clock of metering.timing.now
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Count steps from where this run begins, which after a resume is not zero."""
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The first micro-batch of a step sets its edge."""
        if self._edge is None:
            self._edge = now(pl_module.device.type)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The last micro-batch of a step closes it."""
        self._window_tokens += tokens_in(batch)
        self._window_pairs += pairs_in(batch)
        if trainer.global_step > self._step and self._edge is not None:
            self._step = trainer.global_step
            end = now(pl_module.device.type)
            self.first_step_end = self.first_step_end or end
            self.seconds.append(end - self._edge)
            self._tokens.append(self._window_tokens)
            self._pairs.append(self._window_pairs)
            self._edge, self._window_tokens, self._window_pairs = None, 0.0, 0.0

    def measured(self) -> list[tuple[float, float, float]]:
        """Of each step after the warm-up: seconds, tokens, and pairs of a token and one that it attends to."""
        return list(zip(self.seconds, self._tokens, self._pairs, strict=True))[self.warmup_steps :]

    def readings(self) -> dict[str, Reading]:
        """``steps_per_second``, ``tokens_per_second`` (input tokens, padding left out) and ``warmup_time``."""
        method = "synchronized_clock"
        seconds, tokens = self.seconds[self.warmup_steps :], self._tokens[self.warmup_steps :]
        if not seconds:
            reason = f"the run made no step beyond its {self.warmup_steps} warm-up steps"
            return {
                "steps_per_second": Reading.unknown("steps/s", reason),
                "tokens_per_second": Reading.unknown("tokens/s", reason),
            }
        mean = statistics.fmean(seconds)
        interval = mean_interval95(seconds)
        ends = (1 / interval[1], 1 / interval[0]) if interval and interval[0] > 0 else None
        figures = {
            "steps_per_second": Reading(1 / mean, "steps/s", method, interval95=ends, n=len(seconds)),
            "tokens_per_second": Reading(sum(tokens) / sum(seconds), "tokens/s", method, n=len(seconds)),
        }
        if self.warmup_steps:
            figures["warmup_time"] = Reading(sum(self.seconds[: self.warmup_steps]), "s", method, n=self.warmup_steps)
        return figures
