"""Bottleneck adapters (Houlsby et al. 2019, section 2.1), which PEFT lacks, on PEFT's extension points.

After attention and after the feed-forward block, before each is added to the residual stream, a small network with a
skip connection: h + W_up f(W_down h + b_down) + b_up. In a Llama those two places are the outputs of ``o_proj`` and
``down_proj``. W_up starts at zero, so that the model starts as it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from llm_at_home.adapters.layer import cast_input

PEFT_TYPE = "BOTTLENECK"
ACTIVATIONS: dict[str, Any] = {"gelu": nn.functional.gelu, "relu": nn.functional.relu, "silu": nn.functional.silu}
# Where the two blocks of a decoder layer end.
BLOCK_ENDS = ["o_proj", "down_proj"]


@dataclass
class BottleneckConfig(PeftConfig):
    """Settings of bottleneck adapters.

    Args:
        bottleneck_size: width between the two projections.
        activation: ``gelu``, ``relu`` or ``silu``.
        target_modules: last names of the linear layers after which an adapter stands.

    Raises:
        ValueError: for a width below 1 or an activation that does not exist.
    """

    bottleneck_size: int = field(default=64, metadata={"help": "Width between the two projections."})
    activation: str = field(default="gelu", metadata={"help": "Between the projections: gelu, relu or silu."})
    target_modules: list[str] | None = field(default=None, metadata={"help": "Layers after which an adapter stands."})
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Layers left out."})
    layers_to_transform: list[int] | None = field(default=None, metadata={"help": "Decoder layers; None is all."})
    layers_pattern: str | None = field(default=None, metadata={"help": "Name of the list of decoder layers."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.bottleneck_size < 1:
            raise ValueError(f"bottleneck_size={self.bottleneck_size} is too small: give at least 1")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation} is unknown: choose one of {', '.join(ACTIVATIONS)}")


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear layer of any library with bottleneck adapters after it.

    Args:
        base_layer: has ``in_features`` and ``out_features``.
        adapter_name: of the first adapter.
        config: its settings.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: Any, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.activation: dict[str, str] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self._disable_adapters = False
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Make the two projections of an adapter."""
        down = nn.Linear(self.out_features, config.bottleneck_size)
        up = nn.Linear(config.bottleneck_size, self.out_features)
        nn.init.normal_(down.weight, std=0.01)
        nn.init.zeros_(down.bias)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self.activation[adapter_name] = config.activation
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output, of shape (..., outputs), through each active adapter."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                down, up = self.bottleneck_down[name], self.bottleneck_up[name]
                dtype = next(down.parameters()).dtype
                hidden = ACTIVATIONS[self.activation[name]](down(cast_input(result, dtype)))
                result = result + up(hidden).to(result.dtype)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: what is not linear in its input has no place in a weight.

        Raises:
            ValueError: always.
        """
        raise ValueError("bottleneck adapters cannot be merged, since they are not linear: serve them beside the base")


class BottleneckModel(BaseTuner):
    """PEFT's tuner for :class:`BottleneckLayer`."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping = {  # noqa: RUF012 (PEFT's own declaration)
        kind: BLOCK_ENDS for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "smollm3", "granite")
    }

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        new = BottleneckLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)
