"""Committed records that tell what a run will take: of the same method on a model of that size."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.planning.shape import Shape
from llm_at_home.quantization.naming import quant_words
from llm_at_home.records.schema import Record

RESULTS = Path(__file__).resolve().parents[4] / "results"
# What a record must know to tell a run's time.
RATES = {"infer": "output_tokens_per_second", "train": "steps_per_second"}
SAME_SIZE = 0.1  # relative difference of parameters


@dataclass(frozen=True)
class Measured:
    """A committed record and where it lies, below ``results/``."""

    record: Record
    place: str

    @property
    def seconds(self) -> float | None:
        """Of the whole run, loading included."""
        found = self.record.provenance.get("seconds")
        return None if found is None else float(found)

    def value(self, name: str) -> float | None:
        """A reading's value, or None where the record does not know it."""
        reading = self.record.readings.get(name)
        return None if reading is None else reading.value

    def reason(self, name: str) -> str:
        """Why it does not know it."""
        reading = self.record.readings.get(name)
        return str(reading.reason) if reading is not None and reading.reason else f"{self.place} has no {name}"


@functools.cache
def committed(results: Path = RESULTS) -> tuple[Measured, ...]:
    """Every finished run below ``results/``."""
    found = []
    for path in sorted(results.rglob("record.json")):
        record = Record.from_dict(json.loads(path.read_text(encoding="utf-8")))
        if record.status == "ok":
            found.append(Measured(record, str(path.parent.relative_to(results))))
    return tuple(found)


def nearest(task: str, config: Mapping[str, Any], results: Path = RESULTS) -> Measured | None:
    """The committed run of the same task, method, model size and kind of device that is nearest to this one.

    The same card comes first, then the same groups, the same dtype, the same batch, and random or real weights alike.
    """
    rate = RATES.get(task)
    alike = [one for one in committed(results) if _is_alike(task, config, one.record) and (not rate or one.value(rate))]
    return min(alike, key=lambda one: _distance(config, one.record), default=None)


def _is_alike(task: str, config: Mapping[str, Any], record: Record) -> bool:
    theirs = record.config
    if record.task != task:
        return False
    if task == "evaluate":
        return bool(theirs.get("task") == "judge" and theirs["judge"]["name"] == config["judge"]["name"])
    if theirs["gpu"].get("device") != config["gpu"]["device"]:
        return False
    quants = [(group["name"], group.get("bits"), group.get("type")) for group in (theirs["quant"], config["quant"])]
    if quants[0] != quants[1] or (theirs.get("prune") or {}).get("name", "none") != "none":
        return False
    if task == "train" and _adapter(theirs) != _adapter(config):
        return False
    if task == "infer" and theirs["engine"]["name"] != config["engine"]["name"]:
        return False
    return _same_size(theirs["model"], config["model"])


def _adapter(config: Mapping[str, Any]) -> tuple[str, str]:
    adapter = config["adapter"]
    return str(adapter["name"]).removesuffix("_r32"), str(adapter.get("implementation", ""))


def _same_size(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    try:
        sizes = [Shape.of(model).parameters for model in (one, other)]
    except Refusal:
        return one["name"] == other["name"]
    return abs(sizes[0] / sizes[1] - 1) < SAME_SIZE


def _distance(config: Mapping[str, Any], record: Record) -> tuple[Any, ...]:
    theirs = record.config
    if "judge" in config:
        return (theirs["judge"]["mode"] != config["judge"]["mode"], record.counts.get("judge_prompt_tokens", 0))
    return (
        theirs["gpu"].get("card") != config["gpu"]["card"],
        quant_words(theirs["quant"]) != quant_words(config["quant"]),
        theirs["dtype"] != config["dtype"],
        _memory_saved(theirs) != _memory_saved(config),
        abs(_batch(theirs) - _batch(config)),
        theirs["model"]["weights"] != config["model"]["weights"],
        -record.counts.get("generated_tokens", record.counts.get("optimizer_steps", 0)),
    )


def _memory_saved(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a training run trades time for memory; records of before there was any did not."""
    memory = config.get("memory") or {}
    optimizer = (config.get("optimizer") or {}).get("_target_")
    return optimizer, memory.get("checkpointing", "none"), memory.get("loss_tokens")


def _batch(config: Mapping[str, Any]) -> int:
    group = config.get("data") or config["engine"]
    return int(group.get("batch_size", 1))
