"""The models of ``conf/model`` by their shapes: which are assistants of a size, which are smaller."""

from __future__ import annotations

import contextlib
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.planning.composing import CONF
from llm_at_home.planning.shape import Shape

LIKE_SIZE = 0.25  # a model within this share of another's parameters


def smaller(shape: Shape) -> list[tuple[str, dict[str, Any], Shape]]:
    """Name, group and shape of the models with fewer parameters, the largest first."""
    found = [one for one in _models() if one[2].parameters < shape.parameters]
    return sorted(found, key=lambda one: -one[2].parameters)


def assistants(shape: Shape) -> list[str]:
    """Models of about this size that bring a chat template of their own, as a base model does not."""
    return [
        name
        for name, group, one in _models()
        if group["chat_template"] is None and abs(one.parameters / shape.parameters - 1) < LIKE_SIZE
    ]


def _models() -> list[tuple[str, dict[str, Any], Shape]]:
    import yaml

    found = []
    for path in sorted((CONF / "model").glob("*.yaml")):
        group = yaml.safe_load(path.read_text(encoding="utf-8"))
        with contextlib.suppress(Refusal):  # model=custom has no shape until a source is named
            found.append((path.stem, group, Shape.of(group)))
    return found
