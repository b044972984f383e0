"""No quantization: the weights as they are, in the chosen dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.models.loading import load_weights


def check(config: Mapping[str, Any]) -> None:
    """Refuse a number of bits, which would change nothing; dense weights load in every dtype and train in every way.

    Raises:
        Refusal: naming what has fewer.
    """
    name, bits = config["quant"]["name"], config["quant"].get("bits")
    if bits is not None:
        raise Refusal(f"quant.bits={bits} changes nothing of quant={name}: choose dtype=, or quant=rtn quant.bits=4")


def load(config: Mapping[str, Any]) -> Any:
    """The dense model on its device."""
    return load_weights(config["model"], config["dtype"], config["gpu"]["device"])
