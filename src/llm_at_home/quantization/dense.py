"""No quantization: the weights as they are, in the chosen dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_at_home.models.loading import load_weights


def check(config: Mapping[str, Any]) -> None:
    """Nothing to refuse: dense weights load in every dtype and train in every way."""


def load(config: Mapping[str, Any]) -> Any:
    """The dense model on its device."""
    return load_weights(config["model"], config["dtype"], config["gpu"]["device"])
