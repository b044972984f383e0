"""What the planner does for a training run: ``trainer.micro_batch=auto``, and its peaks beside the measured ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.hardware.catalogue import capability
from llm_at_home.hardware.present import present_gpus
from llm_at_home.planning.plan import peaks
from llm_at_home.planning.search import USED, choose
from llm_at_home.planning.training import predict_training
from llm_at_home.records.schema import Reading

KEY = "micro_batch"
AUTO = "auto"
# CUDA offers a little less than the driver counts.
OFFERED = 0.98


def settle(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with ``trainer.micro_batch`` taken out, and for ``auto`` with what the planner chose.

    Micro-batch, accumulation and recomputed layers are chosen for the most steps a second within the card's memory; the
    effective batch, ``data.batch_size`` times ``callbacks.accumulation.steps``, stays.

    Raises:
        Refusal: for another word, where the memory is not known, and where nothing fits.
    """
    trainer = dict(config["trainer"])
    wanted = trainer.pop(KEY, None)
    config = {**config, "trainer": trainer}
    if wanted is None:
        return config
    if wanted != AUTO:
        raise Refusal(f"trainer.{KEY}={wanted} is unknown: choose {AUTO}, or null and data.batch_size={wanted}")
    if "accumulation" not in (config["callbacks"] or {}):
        raise Refusal(f"trainer.{KEY}={AUTO} sets the accumulation: leave callbacks.accumulation in")
    if isinstance(config["callbacks"]["accumulation"]["steps"], Mapping):
        raise Refusal(f"trainer.{KEY}={AUTO} chooses one accumulation: give callbacks.accumulation.steps as a number")
    choice = choose(config, USED * _memory(config["gpu"]), _capability(config["gpu"]))
    planned = {
        "micro_batch": choice.micro_batch,
        "accumulation": choice.accumulation,
        "checkpointing": choice.checkpointing,
    }
    return {**choice.apply(config), "planned": planned}


def predicted(config: Mapping[str, Any]) -> dict[str, Reading]:
    """The planner's peaks for a run on a GPU, under the measured ones' names; nothing for the CPU.

    What the planner does not know is unknown, with its reason.
    """
    if config["gpu"]["device"] != "cuda":
        return {}
    try:
        return peaks(predict_training(config, _capability(config["gpu"])))
    except Refusal as refusal:
        return {"predicted_torch_reserved_peak": Reading.unknown("GB", str(refusal), "predicted")}


def _memory(gpu: Mapping[str, Any]) -> float:
    if gpu["device"] == "cuda" and gpu.get("memory"):
        return float(gpu["memory"])
    if gpu["device"] == "cuda" and present_gpus() and present_gpus()[0].memory:
        return OFFERED * float(present_gpus()[0].memory or 0.0)
    raise Refusal(
        f"trainer.{KEY}={AUTO} needs a GPU whose memory is known: use trainer.{KEY}=null and data.batch_size=1"
    )


def _capability(gpu: Mapping[str, Any]) -> tuple[int, int]:
    return capability(gpu.get("compute_capability", "9.0"))
