"""The further processes of a run over several devices: started by Lightning from the first, they leave no record."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

VARIABLE = "LLM_AT_HOME_FIRST_PROCESS"  # its id
RANK = "LOCAL_RANK"  # Lightning's and torchrun's name for it


def is_helper() -> bool:
    """Whether this is such a process. A rank that the surroundings have set does not make it one."""
    return os.environ.get(VARIABLE, str(os.getpid())) != str(os.getpid())


def mark_children() -> None:
    """What this process starts from now on are its helpers."""
    os.environ[VARIABLE] = str(os.getpid())
    os.environ.pop(RANK, None)


def use_own_device(config: Mapping[str, Any]) -> None:
    """Load onto the card of this process's rank: transformers takes the current one."""
    if config["gpu"]["device"] == "cuda" and is_helper():
        import torch

        torch.cuda.set_device(int(os.environ[RANK]))
