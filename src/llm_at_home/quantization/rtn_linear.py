"""The arithmetic of round-to-nearest: codes and scales, their packing, and the layer that computes with them.

Each weight w becomes an integer code q of ``bits`` bits, and is read back as (q - zero) * scale. Asymmetric codes span
the range of the values that share a scale, so the error of a weight is at most scale / 2; symmetric codes keep zero at
zero. Background: Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 2.
"""

from __future__ import annotations

import torch


def quantize(
    weight: torch.Tensor, bits: int, scheme: str, granularity: str, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zero points of a weight matrix.

    Args:
        weight: of shape (outputs, inputs).
        bits: of a code.
        scheme: ``symmetric`` or ``asymmetric``.
        granularity: what shares a scale: the whole ``tensor``, an output ``channel``, or a ``group`` of inputs.
        group_size: inputs in a group.

    Returns:
        Codes from 0 to 2^bits - 1 as int16, of shape (rows, values that share a scale); scales and zero points of shape
        (rows, 1), where (code - zero) * scale is the weight read back.
    """
    values = {"tensor": (1, -1), "channel": (weight.shape[0], -1), "group": (-1, group_size)}
    rows = weight.detach().float().reshape(values[granularity])
    highest = 2**bits - 1
    if scheme == "asymmetric":
        low = rows.amin(1, keepdim=True).clamp(max=0)
        scale = (rows.amax(1, keepdim=True).clamp(min=0) - low) / highest
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = (-low / scale).round()
    else:
        # The lowest code is left unused, so that the grid is the same on both sides of zero.
        middle = 2 ** (bits - 1)
        scale = rows.abs().amax(1, keepdim=True) / (middle - 1)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = torch.full_like(scale, middle)
    codes = (rows / scale + zero).round().clamp(0, highest)
    return codes.to(torch.int16), scale, zero


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes as bit planes, eight codes of one plane to a byte: any number of bits takes exactly its share.

    Args:
        codes: any shape, a multiple of eight in all.

    Returns:
        uint8 of shape (bits, codes / 8).
    """
    flat = codes.flatten().to(torch.int32)
    powers = 2 ** torch.arange(8, device=flat.device, dtype=torch.int32)
    planes = [(((flat >> plane) & 1).reshape(-1, 8) * powers).sum(1) for plane in range(bits)]
    return torch.stack(planes).to(torch.uint8)


def unpack(planes: torch.Tensor) -> torch.Tensor:
    """The codes of :func:`pack` as int16, flat."""
    shifts = torch.arange(8, device=planes.device, dtype=torch.uint8)
    bits = (planes.unsqueeze(-1) >> shifts) & 1
    codes = torch.zeros(bits[0].numel(), device=planes.device, dtype=torch.int16)
    for plane, values in enumerate(bits):
        codes |= values.flatten().to(torch.int16) << plane
    return codes


class RTNLinear(torch.nn.Linear):
    """A linear layer that keeps packed codes and reads its weight back at each call: small, and slow.

    Args:
        linear: the dense layer to quantize.
        bits, scheme, granularity, group_size: as for :func:`quantize`.
    """

    planes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    SETTINGS = ("bits", "scheme", "granularity", "group_size")

    def __init__(self, linear: torch.nn.Linear, bits: int, scheme: str, granularity: str, group_size: int) -> None:
        torch.nn.Module.__init__(self)  # no dense weight is made
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        codes, scale, zero = quantize(linear.weight, bits, scheme, granularity, group_size)
        self.rows = codes.shape[0]
        self.register_buffer("planes", pack(codes, bits))
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.register_buffer("zero", zero.to(torch.uint8))

    def dequantized(self) -> torch.Tensor:
        """The weight read back, of shape (outputs, inputs), in the dtype of the scales."""
        codes = unpack(self.planes).reshape(self.rows, -1).to(self.scale.dtype)
        return ((codes - self.zero.to(self.scale.dtype)) * self.scale).reshape(self.out_features, self.in_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The product with the weight read back; gradients reach the input and not the codes."""
        return torch.nn.functional.linear(input, self.dequantized().to(input.dtype), self.bias)

    def extra_repr(self) -> str:
        """Shape and bits."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.planes.shape[0]}"
