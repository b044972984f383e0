"""Making a pruned checkpoint ahead of its use: ``python -m llm_at_home.tasks.prune prune=wanda``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from llm_at_home.records.schema import Record
from llm_at_home.records.tracking import Tracker
from llm_at_home.tasks import launch


def run(config: dict[str, Any], folder: Path, record: Record, tracker: Tracker | None) -> None:
    """Make the checkpoint that ``prune=`` names if the cache lacks it, and record what that took.

    Args:
        config: a resolved configuration of ``conf/prune.yaml``.
        folder: the run folder.
        record: filled with where it is kept and what memory its making took.
        tracker: MLflow, or None.
    """
    from llm_at_home.metering.memory import MemoryMeter
    from llm_at_home.pruning import checkpoint

    with MemoryMeter(config["gpu"]["device"]) as memory:
        try:
            record.notes.append(f"kept in {checkpoint.ensure(config)}")
        finally:
            record.readings |= memory.readings()


@hydra.main(version_base="1.3", config_path="../../../conf", config_name="prune")
def main(config: DictConfig) -> float | list[float] | None:
    """Run one making in a process of its own and return its metric."""
    return launch.job("prune", config)


if __name__ == "__main__":
    launch.run(main)
