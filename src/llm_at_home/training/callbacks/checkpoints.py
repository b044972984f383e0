"""Checkpoints: the adapter in PEFT's own format, and all that an exact resume needs."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy
import torch
from lightning.pytorch import Callback, Trainer

TRAINER_STATE = "trainer.ckpt"
PREVIOUS = "checkpoints.previous"


class Checkpoints(Callback):
    """Saves ``checkpoints/step_N`` in the run folder every ``every_n_steps`` optimizer steps and when interrupted.

    Each holds ``adapter/`` (or ``model/`` where every weight trains), which PEFT and transformers read, and
    ``trainer.ckpt`` with the trainable weights, optimizer, schedule, position in the data and random states. It is
    written under a temporary name and renamed, so that a full disk leaves the last one whole. What an earlier run left
    in the folder becomes ``checkpoints.previous`` when a run begins anew there.

    Args:
        every_n_steps: optimizer steps between two checkpoints.
        keep: how many to keep; older ones are deleted after a newer one is whole.
    """

    def __init__(self, every_n_steps: int = 100, keep: int = 1) -> None:
        self.every_n_steps = every_n_steps
        self.keep = keep
        self._last_step = 0
        self._saved: int | None = None
        self._random: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The states of every random generator that training draws from."""
        return {
            "python": random.getstate(),
            "numpy": numpy.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts: what Lightning does in between may draw random numbers."""
        self._random = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Restore the random states of a resumed run; put aside what is not of this run."""
        self._last_step = trainer.global_step
        if trainer.global_step == 0 and trainer.is_global_zero:
            _put_aside(Path(trainer.default_root_dir))
        if self._random is not None:
            random.setstate(self._random["python"])
            numpy.random.set_state(self._random["numpy"])
            torch.set_rng_state(self._random["torch"])
            if self._random["cuda"]:
                torch.cuda.set_rng_state_all(self._random["cuda"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save at optimizer-step boundaries only: an open accumulation window cannot be resumed."""
        step = trainer.global_step
        if step > self._last_step and step % self.every_n_steps == 0:
            self.save(trainer, pl_module)

    def save(self, trainer: Trainer, pl_module: Any) -> Path | None:
        """Write a checkpoint of the step just made, and return its folder; None where nothing trains.

        Of several processes the first writes, and all must ask Lightning to: it waits for them.
        """
        if not any(p.requires_grad for p in pl_module.parameters()):
            return None
        root = Path(trainer.default_root_dir) / "checkpoints"
        folder = root / f"step_{trainer.global_step:06d}"
        self._last_step = trainer.global_step
        if self._saved == trainer.global_step:
            return folder
        self._saved = trainer.global_step
        temporary = root / f".{folder.name}.tmp"
        if not trainer.is_global_zero:
            trainer.save_checkpoint(temporary / TRAINER_STATE)
            return folder
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            save_weights(pl_module.model, temporary)
            trainer.save_checkpoint(temporary / TRAINER_STATE)
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier run in this folder
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        found = sorted(root.glob("step_*"))
        made = [one for one in found if one.name <= folder.name]
        # A run that was resumed here from elsewhere may find later ones, which are not its own.
        for old in {*found} - {*made[-self.keep :]}:
            shutil.rmtree(old, ignore_errors=True)
        return folder


def _put_aside(run_folder: Path) -> None:
    found = run_folder / "checkpoints"
    if any(found.glob("step_*")):
        shutil.rmtree(run_folder / PREVIOUS, ignore_errors=True)
        found.rename(run_folder / PREVIOUS)


def save_weights(model: Any, folder: Path) -> Path:
    """Save what was trained below ``folder`` in its library's own format, and return the folder that it made."""
    from peft import PeftModel

    name = "adapter" if isinstance(model, PeftModel) else "model"
    model.save_pretrained(folder / name)
    return folder / name


def last_checkpoint(run_folder: Path) -> Path | None:
    """The newest ``trainer.ckpt`` of a run folder, or None."""
    found = sorted((run_folder / "checkpoints").glob(f"step_*/{TRAINER_STATE}"))
    return found[-1] if found else None
