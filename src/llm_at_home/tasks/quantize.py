"""Making a quantized checkpoint before it is used: ``python -m llm_at_home.tasks.quantize [group=choice] ...``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from llm_at_home.records.schema import Reading, Record
from llm_at_home.records.tracking import Tracker
from llm_at_home.tasks import launch


def run(config: dict[str, Any], folder: Path, record: Record, tracker: Tracker | None) -> None:
    """Make the checkpoint that ``quant=`` names if the cache lacks it, load it, and record what it takes.

    Args:
        config: a resolved configuration of ``conf/quantize.yaml``.
        folder: the run folder.
        record: filled with the kernel, the sizes, and what making and loading took.
        tracker: MLflow, or None.
    """
    from llm_at_home.metering.memory import MemoryMeter
    from llm_at_home.quantization.base import method_of

    with MemoryMeter(config["gpu"]["device"]) as memory:
        try:
            made = method_of(config["quant"]).ensure(config)
            record.notes.append(f"kept in {made}")
            _load(config, record)
        finally:
            record.readings |= memory.readings()


def _load(config: Mapping[str, Any], record: Record) -> None:
    from llm_at_home.quantization.base import describe_kernel, load_base
    from llm_at_home.quantization.size import size_readings

    start = time.perf_counter()
    model = load_base(config)
    record.readings["load_time"] = Reading(time.perf_counter() - start, "s", "clock")
    record.kernel = describe_kernel(model)
    record.readings |= size_readings(model)


@hydra.main(version_base="1.3", config_path="../../../conf", config_name="quantize")
def main(config: DictConfig) -> float | list[float] | None:
    """Run one making in a process of its own and return its metric."""
    return launch.job("quantize", config)


if __name__ == "__main__":
    launch.run(main)
