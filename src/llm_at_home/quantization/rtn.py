"""Round-to-nearest: the naive range-based linear quantizer, written out; what the other methods are measured against.

The arithmetic is in ``rtn_linear``; nothing heavy is imported here, since the parent process asks ``check``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.models import source
from llm_at_home.models.loading import load_weights

BITS = (2, 3, 4, 8)
SCHEMES = ("symmetric", "asymmetric")
GRANULARITIES = ("tensor", "channel", "group")


def check(config: Mapping[str, Any]) -> None:
    """Refuse settings that do not exist, and training.

    Raises:
        Refusal: with one line that says what to change.
    """
    quant = config["quant"]
    for key, known in (("bits", BITS), ("scheme", SCHEMES), ("granularity", GRANULARITIES)):
        if quant[key] not in known:
            raise Refusal(f"quant.{key}={quant[key]} is unknown: choose one of {', '.join(map(str, known))}")
    if quant["granularity"] == "group":
        size = quant["group_size"]
        if not isinstance(size, int) or size < 8 or size % 8:
            raise Refusal(f"quant.group_size={size} cannot be packed: give a multiple of 8")
        source.check_group_size(config["model"], size)
    if config.get("adapter", {}).get("trains", "nothing") != "nothing":
        name = config["adapter"].get("name", "full")
        raise Refusal(
            f"quant=rtn adapter={name} cannot train: rtn is there to compare precision; use quant=nf4 or quant=none"
        )


def load(config: Mapping[str, Any]) -> Any:
    """The dense model with every linear layer but the output head replaced by its codes."""
    import torch

    from llm_at_home.quantization.rtn_linear import RTNLinear

    model = load_weights(config["model"], config["dtype"], config["gpu"]["device"])
    quant = config["quant"]
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and module is not head:
            size = quant["group_size"]
            if quant["granularity"] == "group" and module.in_features % size:
                raise Refusal(
                    f"quant.group_size={size} does not divide {name}'s {module.in_features} inputs: give another"
                )
            model.set_submodule(name, RTNLinear(module, **{key: quant[key] for key in RTNLinear.SETTINGS}))
    return model
