"""What architectures are known to do to their logits after the output layer; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# By the key in a model's configuration. A factor (Cohere's, Granite's) is as well applied before the output layer.
CAPS = ("final_logit_softcapping", "logits_soft_cap")
# Where a configuration that leaves the key out does it all the same.
BY_DEFAULT = {
    **dict.fromkeys(("gemma2", "gemma3n_text"), "final_logit_softcapping"),
    "recurrent_gemma": "logits_soft_cap",
}


def capped_logits(shape: Mapping[str, Any]) -> str | None:
    """The key that says that they are capped, or None where they are the output layer's own as far as is known.

    Args:
        shape: the configuration, or its text part.
    """
    shape = shape.get("text_config") or shape
    default = BY_DEFAULT.get(str(shape.get("model_type")))
    if default is not None and default not in shape:
        return default
    return next((key for key in CAPS if shape.get(key)), None)
