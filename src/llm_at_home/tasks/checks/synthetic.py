"""A model without weights has no tokenizer either."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_at_home.data.sources import SYNTHETIC
from llm_at_home.errors import Refusal


def check_synthetic(config: Mapping[str, Any], group: str) -> None:
    """Refuse text for a model that has no tokenizer."""
    model = config["model"]
    if config[group]["source"] != SYNTHETIC and model["weights"] == "random" and model["architecture"]:
        raise Refusal(f"{model['name']} with random weights has no tokenizer: use {group}=synthetic")
