"""LoHa computed with its factors where that is smaller, on any base; PEFT's checkpoints.

The update is scale * (A1 B1) * (A2 B2), element by element (Hyeon-Woo et al. 2021, FedPara). No product with it can
keep the factors apart, since an element-wise product does not distribute over a matrix product. But it is a matrix of
rank at most r^2 with known factors: column (i, j) of the left one is A1's column i times A2's column j, and so for the
rows of the right one. Those have r^2 (inputs + outputs) values instead of inputs * outputs, which is less for a small
r; for a larger one the matrix itself is made. Either is made again for the backward pass instead of kept, so that what
a layer holds is its input and the four small factors.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoHaModel
from peft.tuners.loha.layer import LoHaLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from llm_at_home.adapters.layer import FactoredLinear, cast_input, is_linear, output_dropout


class FactoredLoHaLinear(FactoredLinear, LoHaLayer):
    """A linear layer of any library with LoHa beside it; made as :class:`FactoredLinear` says."""

    def update_layer(  # type: ignore[override]
        self, adapter_name: str, r: int, alpha: float, config: Any, **kwargs: Any
    ) -> None:
        """Make the factors of an adapter, in the shapes that PEFT gives them.

        Raises:
            ValueError: for a rank below 1.
        """
        inputs, outputs = self._set_up(adapter_name, r, alpha, config)
        self.create_adapter_parameters(adapter_name, r, (outputs, inputs))
        if config.init_weights:
            self.reset_adapter_parameters(adapter_name)
        else:
            self.reset_adapter_parameters_random(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _factors(self, adapter_name: str) -> tuple[torch.Tensor, ...]:
        tables = (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)
        return tuple(table[adapter_name] for table in tables)

    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False) -> torch.Tensor:
        """The whole update, of shape (outputs, inputs): for merging alone."""
        return _whole(*self._factors(adapter_name)) * self.scaling[adapter_name]

    def _get_delta_activations(self, adapter_name: str, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The update's part of the output, of shape (..., outputs), of an input ``x`` of shape (..., inputs)."""
        factors = self._factors(adapter_name)
        x = cast_input(x, factors[0].dtype)
        if torch.is_grad_enabled():
            output = checkpoint(_product, x, *factors, use_reentrant=False)
        else:
            output = _product(x, *factors)
        output = output * self.scaling[adapter_name]
        if self.training and self.rank_dropout[adapter_name]:
            output = output * output_dropout(output.shape[-1], self.rank_dropout[adapter_name], True, output)
        return output


def _whole(a1: torch.Tensor, b1: torch.Tensor, a2: torch.Tensor, b2: torch.Tensor) -> torch.Tensor:
    return (a1 @ b1) * (a2 @ b2)


def _product(
    input: torch.Tensor, a1: torch.Tensor, b1: torch.Tensor, a2: torch.Tensor, b2: torch.Tensor
) -> torch.Tensor:
    """The input times the transposed update, by whichever of the two matrices is smaller.

    Args:
        input: of shape (..., inputs).
        a1, a2: of shape (outputs, r).
        b1, b2: of shape (r, inputs).
    """
    outputs, rank = a1.shape
    inputs = b1.shape[1]
    if rank**2 * (inputs + outputs) >= inputs * outputs:
        return nn.functional.linear(input, _whole(a1, b1, a2, b2))
    right = (b1.unsqueeze(1) * b2.unsqueeze(0)).flatten(0, 1)  # (r^2, inputs)
    left = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1, 2)  # (outputs, r^2)
    return nn.functional.linear(nn.functional.linear(input, right), left)


class FactoredLoHaModel(LoHaModel):
    """PEFT's LoHa with :class:`FactoredLoHaLinear` for every linear layer; convolutions stay PEFT's."""

    @classmethod
    def _create_new_module(cls, config: Any, adapter_name: str, target: nn.Module, **options: Any) -> Any:
        if is_linear(target):
            return FactoredLoHaLinear(target, adapter_name, config, **options)
        return super()._create_new_module(config, adapter_name, target, **options)
