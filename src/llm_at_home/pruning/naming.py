"""What a pruning is called: a name in a few words that tells it from others of its method."""

from __future__ import annotations

from typing import Any

from llm_at_home.pruning.pattern import UNSTRUCTURED


def prune_words(prune: Any) -> list[str]:
    """Method and pattern of a ``prune`` group, or nothing where nothing is pruned.

    Any key may be missing or of another shape, as in a record of an older version.
    """
    if not isinstance(prune, dict) or prune.get("name", "none") == "none":
        return []
    pattern, sparsity = prune.get("pattern"), prune.get("sparsity")
    share = f" {100 * sparsity:g} %" if isinstance(sparsity, int | float) and pattern == UNSTRUCTURED else f" {pattern}"
    kernel = ["semi-structured kernel"] if prune.get("kernel") == "semi_structured" else []
    return [f"{prune['name']}{share}", *kernel]
