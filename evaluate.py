"""Judge answers, or score a test split: ``python evaluate.py [group=choice] [key=value] [-m]``."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from llm_at_home.tasks import launch


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(config: DictConfig) -> float | list[float] | None:
    """Run one evaluation job in a process of its own and return its metric or metrics."""
    return launch.job("evaluate", config)


if __name__ == "__main__":
    launch.run(main)
