"""LoKr computed with its factors, on any base: PEFT's layer and checkpoints, without the Kronecker product.

The update is scale * (A kron B) with A of shape (out_A, in_A) and B of shape (out_B, in_B) (Yeh et al. 2023, LyCORIS,
section 3). PEFT builds the whole matrix, as large as the layer's weight, at each forward pass, and keeps it for the
backward one. With an input x of in_A * in_B values reshaped row by row to X of shape (in_A, in_B), the same product is
A X B^T, reshaped back: nothing larger than activations is ever made, and the base's weight is not looked at, so that
it may be packed in any format.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import LoKrModel
from peft.tuners.lokr.layer import LoKrLayer, factorization
from torch import nn

from llm_at_home.adapters.layer import FactoredLinear, cast_input, is_linear, output_dropout

FUSED_FACTOR = 16  # values of a first factor that compiled code multiplies with one by one


class FactoredLoKrLinear(FactoredLinear, LoKrLayer):
    """A linear layer of any library with LoKr beside it; made as :class:`FactoredLinear` says."""

    def update_layer(  # type: ignore[override]
        self, adapter_name: str, r: int, alpha: float, config: Any, **kwargs: Any
    ) -> None:
        """Make the factors of an adapter, in the shapes that PEFT gives them.

        Raises:
            ValueError: for a rank below 1.
        """
        inputs, outputs = self._set_up(adapter_name, r, alpha, config)
        self.rank_dropout_scale[adapter_name] = config.rank_dropout_scale
        in_a, in_b = factorization(inputs, config.decompose_factor)
        out_a, out_b = factorization(outputs, config.decompose_factor)
        whole_a = not (config.decompose_both and r < max(out_a, in_a) / 2)
        whole_b = not r < max(out_b, in_b) / 2
        self.create_adapter_parameters(adapter_name, r, ((out_a, out_b), (in_a, in_b)), whole_a, whole_b, False)
        if not config.init_weights:
            self.reset_adapter_parameters_random(adapter_name)
        elif config.init_weights == "lycoris":
            self.reset_adapter_parameters_lycoris_way(adapter_name)
        else:
            self.reset_adapter_parameters(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _first(self, adapter_name: str) -> torch.Tensor:
        if adapter_name in self.lokr_w1:
            return self.lokr_w1[adapter_name]
        return self.lokr_w1_a[adapter_name] @ self.lokr_w1_b[adapter_name]

    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False) -> torch.Tensor:
        """The whole update, of shape (outputs, inputs): for merging alone."""
        if adapter_name in self.lokr_w2:
            second = self.lokr_w2[adapter_name]
        else:
            second = self.lokr_w2_a[adapter_name] @ self.lokr_w2_b[adapter_name]
        return torch.kron(self._first(adapter_name), second) * self.scaling[adapter_name]

    def _get_delta_activations(self, adapter_name: str, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The update's part of the output.

        Args:
            adapter_name: which adapter.
            x: of shape (..., inputs).

        Returns:
            Of shape (..., outputs).
        """
        # Scaled where it is smallest.
        first = self._first(adapter_name) * self.scaling[adapter_name]
        x = cast_input(x, first.dtype)
        rows = x.unflatten(-1, (first.shape[1], -1))
        if adapter_name in self.lokr_w2:
            second = self.lokr_w2[adapter_name]
            if first.shape[0] * second.shape[1] <= first.shape[1] * second.shape[0]:
                mixed = nn.functional.linear(_mix(first, rows), second)
            else:
                mixed = _mix(first, nn.functional.linear(rows, second))
        else:
            # Mixed where it is smallest: between the two halves of the second factor.
            inner = nn.functional.linear(rows, self.lokr_w2_b[adapter_name])
            mixed = nn.functional.linear(_mix(first, inner), self.lokr_w2_a[adapter_name])
        output = mixed.flatten(-2)
        if self.training and self.rank_dropout[adapter_name]:
            rate, scale = self.rank_dropout[adapter_name], self.rank_dropout_scale[adapter_name]
            output = output * output_dropout(output.shape[-1], rate, scale, output)
        return output


def _mix(first: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``first @ rows`` over the second last dimension, which for the usual 2 x 2 factor is a few scaled sums.

    Args:
        first: of shape (out_A, in_A).
        rows: of shape (..., in_A, n).

    Returns:
        Of shape (..., out_A, n).
    """
    if torch.compiler.is_compiling() and first.numel() <= FUSED_FACTOR:
        # Fused with what stands around it. One factor for each row, so that its gradient is summed over a row's values
        # and then over rows: a few sums over everything took a tenth of a step on an H100 (docs/fast_training.md).
        each = first.expand(*rows.shape[:-2], *first.shape)
        return (each.unsqueeze(-1) * rows.unsqueeze(-3)).sum(-2).to(rows.dtype)
    first = first.to(rows.dtype)
    return torch.matmul(first, rows)


class FactoredLoKrModel(LoKrModel):
    """PEFT's LoKr with :class:`FactoredLoKrLinear` for every linear layer; convolutions stay PEFT's."""

    @classmethod
    def _create_new_module(cls, config: Any, adapter_name: str, target: nn.Module, **options: Any) -> Any:
        if is_linear(target):
            return FactoredLoKrLinear(target, adapter_name, config, **options)
        return super()._create_new_module(config, adapter_name, target, **options)


def equal_rank(lora_rank: int, inputs: int, outputs: int, factor: int = 2) -> int:
    """The LoKr rank whose decomposed second factor has as many parameters as a LoRA of ``lora_rank``, rounded down.

    A LoRA has ``lora_rank * (inputs + outputs)``; LoKr at this factor has its first factor's and
    ``rank * (inputs + outputs) / factor``.
    """
    return math.floor((lora_rank * (inputs + outputs) - factor**2) * factor / (inputs + outputs))
