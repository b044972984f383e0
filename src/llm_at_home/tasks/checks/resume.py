"""Which interrupted run a training run may go on with: the same, from a checkpoint that it can still go on from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_at_home.data.sources import SYNTHETIC, data_hash
from llm_at_home.errors import Refusal
from llm_at_home.records import store
from llm_at_home.training.accumulation_schedule import accumulation_schedule

GROUPS = (
    "model",
    "quant",
    "prune",
    "adapter",
    "adapter_path",
    "data",
    "optimizer",
    "scheduler",
    "dtype",
    "seed",
    "limit",
)
# Single keys that are as much a part of the run; what only saves memory or time may change.
ALIKE = ("trainer.precision", "callbacks.clipping.max_norm")


def check_resume(config: Mapping[str, Any], folder: str) -> None:
    """Refuse to go on with another run than the one that was interrupted.

    Args:
        config: a resolved configuration of ``conf/train.yaml``.
        folder: of the interrupted run. A run that was cut off with its machine has left no record there: then its job
            says how it was run.

    Raises:
        Refusal: with one line that says what to change.
    """
    made = [path.parent.name for path in (Path(folder) / "checkpoints").glob("step_*/trainer.ckpt")]
    if not made:
        raise Refusal(f"resume={folder} holds no checkpoint: give the folder of an interrupted training run")
    _check_same(config, {"prune": {"name": "none"}, **store.config_of(folder)}, folder)
    _check_data(config, folder)
    step, steps = int(max(made).removeprefix("step_")), config["trainer"]["max_steps"]
    if step > steps:
        raise Refusal(f"resume={folder} has made {step} steps, more than trainer.max_steps={steps}: give as many")


def accumulation(config: Mapping[str, Any]) -> Any:
    """``callbacks.accumulation.steps``, which is 1 where the callback is left out."""
    return ((config.get("callbacks") or {}).get("accumulation") or {}).get("steps", 1)


def _check_same(config: Mapping[str, Any], before: Mapping[str, Any], folder: str) -> None:
    for group in GROUPS:
        if config[group] != before.get(group):
            raise Refusal(f"resume={folder} was run with another {group}: give the same overrides as then")
    steps = [accumulation(c) for c in (config, before)]
    if accumulation_schedule(steps[0]) != accumulation_schedule(steps[1]):
        raise Refusal(f"resume={folder} was run with callbacks.accumulation.steps={steps[1]}: give the same")
    for key in ALIKE:
        now, then = (_at(c, key) for c in (config, before))
        if now != then:
            raise Refusal(f"resume={folder} was run with {key}={then}: give the same")
    planned = before["trainer"]["max_steps"]
    if "schedule" in config["adapter"] and config["trainer"]["max_steps"] != planned:
        why = f"adapter={config['adapter']['name']} hands out its ranks over the steps of the run"
        raise Refusal(f"resume={folder} was run with trainer.max_steps={planned}, and {why}: give the same")


def _at(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = (value or {}).get(part)
    return value


def _check_data(config: Mapping[str, Any], folder: str) -> None:
    """The position in the data means nothing in a file that has changed since."""
    data = config["data"]
    if data["source"] == SYNTHETIC or not (Path(folder) / store.RECORD).is_file():
        return
    before = store.load(folder).provenance.get("data")
    if before and before != data_hash(data["source"], path=data["path"], test_path=data["test_path"]):
        hint = "give the file as it was, or go on from the adapter with adapter_path="
        raise Refusal(f"resume={folder} was run on other conversations than data={data['name']} has now: {hint}")
