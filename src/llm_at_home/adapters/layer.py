"""What this project's own adapter layers share."""

from __future__ import annotations

from typing import Any

import torch


def is_linear(target: Any) -> bool:
    """Whether a module, an adapter's wrapper taken off, is a linear layer of whatever library."""
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    return hasattr(base, "in_features") and hasattr(base, "out_features")


def widths(base: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer of whatever library."""
    return base.in_features, base.out_features


def cast_input(input: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The input in the adapter's dtype, unless autocast chooses the dtype of products anyway.

    PEFT casts in both cases, which under autocast makes a float32 copy of the input only to cast it back.
    """
    return input if torch.is_autocast_enabled(input.device.type) else input.to(dtype)


def output_dropout(outputs: int, rate: float, rescale: bool, like: torch.Tensor) -> torch.Tensor:
    """A mask over output features: a dropped row of the update's weight is a dropped output.

    Args:
        outputs: how many.
        rate: the share that is dropped.
        rescale: divide by the share that was kept.
        like: gives device and dtype.
    """
    kept = (torch.rand(outputs) > rate).to(like.device, like.dtype)
    return kept / kept.mean() if rescale else kept


class DenseMergeOnly:
    """Merging adds the update to the base's weight, which only a dense floating-point weight can take."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update to the base's weight.

        Raises:
            ValueError: for a quantized base.
        """
        weight = getattr(self.get_base_layer(), "weight", None)  # type: ignore[attr-defined]
        inputs, outputs = widths(self.get_base_layer())  # type: ignore[attr-defined]
        if type(weight) is not torch.nn.Parameter or tuple(weight.shape) != (outputs, inputs):
            raise ValueError("this adapter merges into a dense base only: load the base with quant=none")
        super().merge(safe_merge, adapter_names)  # type: ignore[misc]
