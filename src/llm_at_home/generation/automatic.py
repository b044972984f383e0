"""``engine=auto``: which engine a device gets; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_at_home.errors import Refusal

EAGER = "llm_at_home.generation.eager.EagerEngine"
OF_GRAPH = {"kernels": "auto", "pages": None}  # its own keys, and what they are where nobody says otherwise


def engine_for(device: str, auto: Mapping[str, Any]) -> dict[str, Any]:
    """The graph engine on a GPU, which answers eagerly what it cannot capture; the eager engine elsewhere.

    Args:
        device: ``cuda`` or ``cpu``.
        auto: ``conf/engine/auto.yaml``, which has the graph engine's keys.

    Raises:
        Refusal: for what only the graph engine has, where there is none.
    """
    if device == "cuda":
        return {**auto, "name": "graph"}
    eager = {key: value for key, value in auto.items() if key not in OF_GRAPH}
    for key, usual in OF_GRAPH.items():
        if auto[key] != usual:
            raise Refusal(f"engine.{key}={auto[key]} is of engine=graph: name that too, or leave the {key} out")
    return {**eager, "name": "eager", "_target_": EAGER}
