"""Linear layers that read the same input, as one product: fewer, larger reads, which is where a step's time goes.

The layers stay usable by themselves, and no memory is added: their own weights become parts of the joined ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

# GPTQModel's layers whose repacked weights stand column block beside column block, so that two can be put together.
MARLIN = ("MarlinLinear", "AwqMarlinLinear")
MARLIN_TENSORS = ("qweight", "scales", "qzeros")


def is_plain(layer: Any) -> bool:
    """Whether a layer is torch's own, with a dense weight; torchao keeps the class and replaces the weight's."""
    return type(layer) is nn.Linear and type(layer.weight.data) is torch.Tensor


def join(layers: Sequence[Any]) -> Any | None:
    """One layer with the outputs of all, in their order, or None where the layers cannot be joined.

    Args:
        layers: linear layers of as many inputs each.
    """
    if all(is_plain(layer) for layer in layers):
        return _join_plain(layers)
    if all(_is_joinable_marlin(layer) for layer in layers) and len({type(layer) for layer in layers}) == 1:
        return _join_marlin(layers)
    return None


def _join_plain(layers: Sequence[nn.Linear]) -> nn.Linear | None:
    if len({layer.bias is None for layer in layers}) != 1:
        return None
    first = layers[0]
    whole = nn.Linear(first.in_features, 1, bias=first.bias is not None, device="meta")
    whole.out_features = sum(layer.out_features for layer in layers)
    for name in ("weight",) if first.bias is None else ("weight", "bias"):
        setattr(whole, name, nn.Parameter(_rows_together([getattr(layer, name) for layer in layers]), False))
    return whole.eval()


def _rows_together(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """One tensor whose rows, in turn, the parameters are from now on; what is joined already stays as it is."""
    first = parameters[0].data
    rows = [parameter.shape[0] for parameter in parameters]
    place = first.data_ptr()
    for parameter in parameters:
        if (
            parameter.data_ptr() != place
            or parameter.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            break
        place += parameter.numel() * parameter.element_size()
    else:
        return first.as_strided((sum(rows), *first.shape[1:]), first.stride())
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, whole.split(rows), strict=True):
        parameter.data = part
    return whole


def _is_joinable_marlin(layer: Any) -> bool:
    if type(layer).__name__ not in MARLIN or layer.bias is not None or layer.adapter is not None:
        return False
    return layer._marlin_tile_padding is None and layer.g_idx.numel() == 0


def _join_marlin(layers: Sequence[Any]) -> Any | None:
    first = layers[0]
    if len({(layer.bits, layer.group_size, layer.in_features) for layer in layers}) != 1:
        return None
    shared = getattr(first, "llm_at_home_joined", None)
    if shared is not None:
        return shared.whole
    whole = first.__class__.__new__(first.__class__)
    whole.__dict__ = dict(first.__dict__)
    whole._parameters, whole._buffers = dict(first._parameters), dict(first._buffers)
    whole.out_features = sum(layer.out_features for layer in layers)
    for name in MARLIN_TENSORS:
        parts = [getattr(layer, name) for layer in layers]
        if parts[0].numel() == 0:
            continue
        together = torch.cat([part.data for part in parts], dim=1)
        setattr(whole, name, nn.Parameter(together, False) if name in whole._parameters else together)
        # Marlin itself wants whole rows, so from now on the parts compute through the whole.
        for part, view in zip(parts, together.split([part.shape[1] for part in parts], dim=1), strict=True):
            part.data = view
    shared = _Shared(whole, [layer.out_features for layer in layers])
    for index, layer in enumerate(layers):
        layer.llm_at_home_joined = shared
        layer.forward = shared.part(index)
    return whole


class _Shared:
    """A joined layer that its parts compute through: the first asked computes, the others take what is theirs.

    Args:
        whole: the joined layer.
        sizes: outputs of each part.
    """

    def __init__(self, whole: Any, sizes: Sequence[int]) -> None:
        self.whole, self.sizes = whole, list(sizes)
        self._input: torch.Tensor | None = None
        self._left: dict[int, torch.Tensor] = {}

    def part(self, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The forward pass of one part."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            if x is not self._input or index not in self._left:
                self._input = x
                self._left = dict(enumerate(self.whole(x).split(self.sizes, dim=-1)))
            value = self._left.pop(index)
            if not self._left:
                self._input = None
            return value

        return forward
