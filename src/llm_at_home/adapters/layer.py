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


class FactoredLinear:
    """What LoKr and LoHa layers with their factors share; goes before PEFT's layer class in a class's bases.

    Args:
        base_layer: has ``in_features`` and ``out_features``.
        adapter_name: of the first adapter.
        config: PEFT's ``LoKrConfig`` or ``LoHaConfig``.
        r: rank, at least 1.
        alpha: the scale is ``alpha / r``.

    Raises:
        ValueError: for a rank below 1.
    """

    _active_adapter: str | list[str]
    r: dict[str, int]
    alpha: dict[str, float]
    scaling: dict[str, float]
    rank_dropout: dict[str, float]
    module_dropout: dict[str, float]

    def __init__(self, base_layer: Any, adapter_name: str, config: Any, r: int, alpha: float, **_: Any) -> None:
        super().__init__(base_layer)  # type: ignore[call-arg]
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, alpha, config=config)  # type: ignore[attr-defined]

    def _set_up(self, adapter_name: str, r: int, alpha: float, config: Any) -> tuple[int, int]:
        """Keep an adapter's settings, and return the inputs and outputs of the base."""
        if r < 1:
            raise ValueError(f"{type(config).__name__} needs a rank of at least 1, not {r}")
        self.r[adapter_name], self.alpha[adapter_name] = r, alpha
        self.scaling[adapter_name] = alpha / r
        self.rank_dropout[adapter_name] = config.rank_dropout
        self.module_dropout[adapter_name] = config.module_dropout
        return widths(self.get_base_layer())  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Of an input of shape (..., inputs), the base's output of shape (..., outputs) with the update's added.

        PEFT draws a random number in any case and branches on it, which cuts a compiled layer's graph.
        """
        if self.disable_adapters or self.merged or any(self.module_dropout.values()):  # type: ignore[attr-defined]
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        result = self.base_layer(x, *args, **kwargs)  # type: ignore[attr-defined]
        for name in self.active_adapters:  # type: ignore[attr-defined]
            if name in self._available_adapters:  # type: ignore[attr-defined]
                result = result + self._get_delta_activations(name, x, *args, **kwargs)  # type: ignore[attr-defined]
        return result.to(x.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT can approximate the update by a LoRA."""
        return True

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
