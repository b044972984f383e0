"""LoftQ's start of a LoRA on a 4-bit base (Li et al. 2023, section 3, one step), on any device.

The factors begin as the best low-rank account, in the least-squares sense, of what rounding left out of each weight.
PEFT has the same for CUDA alone, and fits the update as if it were not scaled by ``alpha / r``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def start(model: Any, adapter_name: str = "default") -> int:
    """Set the factors of every LoRA layer over a 4-bit one, and return how many there were.

    Args:
        model: a ``PeftModel`` whose base was loaded from a folder or from the hub's cache; the unquantized weights are
            read from there, a layer at a time.
        adapter_name: of the LoRA.

    Raises:
        ValueError: when the base has no 4-bit layer.
    """
    from peft.tuners.lora import Linear4bit
    from peft.utils.loftq_utils import _SafetensorLoader

    weights = _SafetensorLoader(model, str(_folder(model.get_base_model()) / "model.safetensors"))
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    if not layers:
        raise ValueError("LoftQ needs a base of 4-bit layers: use quant=nf4")
    for name, layer in layers:
        wanted = weights.get_tensor(name.removeprefix("base_model.model.") + ".weight")
        left_out = wanted.to(layer.get_base_layer().weight.device, torch.float32) - dequantized(layer.get_base_layer())
        up, down = low_rank(left_out / layer.scaling[adapter_name], layer.r[adapter_name])
        for factor, table in ((up, layer.lora_B), (down, layer.lora_A)):
            weight = table[adapter_name].weight
            weight.data = factor.to(weight.device, weight.dtype)
    return len(layers)


def _folder(base: Any) -> Path:
    """Where the base was loaded from; of the hub's, the commit that was, which PEFT would not ask for."""
    folder = Path(base.name_or_path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    commit = getattr(base.config, "_commit_hash", None)
    return Path(snapshot_download(base.name_or_path, revision=commit, local_files_only=True))


def dequantized(layer: Any) -> torch.Tensor:
    """The weight that a 4-bit layer of bitsandbytes multiplies with, of shape (outputs, inputs), in float32."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the nearest matrix of this rank, of shapes (outputs, rank) and (rank, inputs), equally large."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, roots.unsqueeze(1) * right[:rank]
