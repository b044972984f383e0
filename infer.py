"""Answer a question set, measured, or chat: ``python infer.py [group=choice] [key=value] [-m]``."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from llm_at_home.tasks import launch


@hydra.main(version_base="1.3", config_path="conf", config_name="infer")
def main(config: DictConfig) -> float | list[float] | None:
    """Run one inference job in a process of its own and return its metric or metrics."""
    return launch.job("infer", config)


if __name__ == "__main__":
    launch.run(main)
