"""``engine=auto``: which engine a device gets; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_at_home.errors import Refusal

EAGER = "llm_at_home.generation.eager.EagerEngine"


def engine_for(device: str, auto: Mapping[str, Any]) -> dict[str, Any]:
    """The graph engine on a GPU, which answers eagerly what it cannot capture; the eager engine elsewhere.

    Args:
        device: ``cuda`` or ``cpu``.
        auto: ``conf/engine/auto.yaml``, which has the graph engine's keys.

    Raises:
        Refusal: for kernels by name where there are none.
    """
    if device == "cuda":
        return {**auto, "name": "graph"}
    eager = {key: value for key, value in auto.items() if key != "kernels"}
    if auto["kernels"] != "auto":
        raise Refusal(f"engine.kernels={auto['kernels']} is of engine=graph: name that too, or leave the kernels out")
    return {**eager, "name": "eager", "_target_": EAGER}
