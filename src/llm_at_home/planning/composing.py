"""Composing a command's configuration without running the command, what Hydra cannot compose being one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from llm_at_home.errors import Refusal

CONF = Path(__file__).resolve().parents[3] / "conf"
OWN_CARD = (
    "(another card of NVIDIA's: the nearest of these with your memory in GB, such as gpu=rtx3060 gpu.memory=6.2; "
    "without one gpu=cpu)"
)
# Hydra's own advice to programmers, which is no part of what is wrong.
ADVICE = ("Set the env", "Config search", "provider=", "To append", "full_key", "object_type", "reference_type")


def composed(command: str, words: Sequence[str]) -> DictConfig:
    """The configuration of a file of ``conf`` with a command line's overrides.

    Raises:
        Refusal: for what Hydra cannot compose, in one line.
    """
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose(command, list(words))
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: a group that is null
        line = one_line(error)
        raise Refusal(f"{line} {OWN_CARD}" if "Could not find 'gpu/" in line else line) from error


def one_line(error: Exception) -> str:
    """Hydra's message without its advice and its search path."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line for line in lines if not line.startswith(ADVICE))
