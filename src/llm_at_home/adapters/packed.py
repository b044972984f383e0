"""AdaLoRA and IA3 on linear layers of other libraries, such as GPTQModel's, which PEFT takes for LoRA alone.

Neither method looks at the base's weight to compute, so a packed one will do. Checkpoints are PEFT's. IA3 goes this way
on bitsandbytes' layers too: outside autocast PEFT's own give float32 there whatever came in, which attention in 16 bits
does not take beside queries that no IA3 scales.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import AdaLoraModel, IA3Model
from peft.tuners.adalora.bnb import SVDLinear8bitLt
from peft.tuners.adalora.gptq import SVDQuantLinear
from peft.tuners.ia3.layer import IA3Layer
from torch import nn

from llm_at_home.adapters.layer import cast_input, is_linear, widths
from llm_at_home.quantization.layers import library


def is_packed(target: Any) -> bool:
    """Whether a module is a linear layer that is no subclass of ``torch.nn.Linear``."""
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    return is_linear(base) and not isinstance(base, nn.Linear)


def is_quantized(target: Any) -> bool:
    """Whether a linear layer is packed, or one of bitsandbytes'."""
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    return is_packed(target) or (is_linear(base) and library(base) == "bitsandbytes")


class AdaLoraLinear8bitLt(SVDLinear8bitLt):
    """PEFT's, which outside autocast gives float32 whatever came in: the head in 16 bits does not take it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of an input of shape (..., inputs), the base's output of shape (..., outputs) with the update's added."""
        result = super().forward(x)
        return result if torch.is_autocast_enabled(x.device.type) else result.to(x.dtype)


class PackedAdaLoraModel(AdaLoraModel):
    """PEFT's AdaLoRA, with its layer for GPTQ around every packed linear layer."""

    @staticmethod
    def _create_new_module(
        lora_config: Any, adapter_name: str, target: Any, device_map: Any = None, **kwargs: Any
    ) -> Any:
        if is_packed(target):
            return SVDQuantLinear(
                target, adapter_name, config=lora_config, r=kwargs["r"], lora_alpha=kwargs["lora_alpha"]
            )
        made = AdaLoraModel._create_new_module(lora_config, adapter_name, target, device_map=device_map, **kwargs)
        if type(made) is SVDLinear8bitLt:
            made.__class__ = AdaLoraLinear8bitLt
        return made


class PackedIA3Linear(nn.Module, IA3Layer):
    """A quantized linear layer whose outputs (or inputs, in a feed-forward block) are scaled feature by feature.

    Args:
        base_layer: has ``in_features`` and ``out_features``.
        adapter_name: of the first adapter.
        config: PEFT's ``IA3Config``.
        is_feedforward: scale the inputs.
    """

    def __init__(self, base_layer: Any, adapter_name: str, config: Any, is_feedforward: bool) -> None:
        nn.Module.__init__(self)  # PEFT's own would refuse this base
        self.base_layer = base_layer
        self.in_features, self.out_features = widths(base_layer)
        self.is_feedforward = is_feedforward
        self.ia3_l = nn.ParameterDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Of an input of shape (..., inputs), the base's output of shape (..., outputs) with the factors applied."""
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.ia3_l]
        if self.is_feedforward:
            for name in names:
                x = self._scaled(x, name)
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        for name in names:
            result = self._scaled(result, name)
        return result

    def _scaled(self, values: torch.Tensor, name: str) -> torch.Tensor:
        factors = self.ia3_l[name].flatten()
        return (cast_input(values, factors.dtype) * factors).to(values.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: packed codes cannot be scaled.

        Raises:
            ValueError: always.
        """
        raise ValueError("IA3 merges into a dense base only: load the base with quant=none")


class PackedIA3Model(IA3Model):
    """PEFT's IA3, with :class:`PackedIA3Linear` around every quantized linear layer."""

    @staticmethod
    def _create_new_module(ia3_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        if is_quantized(target):
            return PackedIA3Linear(target, adapter_name, ia3_config, bool(kwargs.get("is_feedforward")))
        return IA3Model._create_new_module(ia3_config, adapter_name, target, **kwargs)
