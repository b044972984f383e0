"""What a quantized checkpoint takes on disk, and what its making took."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from llm_at_home.quantization.layers import linear_layers
from llm_at_home.records.schema import Reading

METHOD = "tensors_on_disk"


def checkpoint_readings(model: Any) -> dict[str, Reading]:
    """``checkpoint_size`` (GB) and ``bits_per_weight_on_disk`` of a model that was read from a checkpoint, and where it
    was made here ``make_time`` (s) and ``make_resident_set_peak`` (GB); nothing for other models."""
    folder = getattr(model, "llm_at_home_checkpoint", None)
    if folder is None or not Path(folder).is_dir():
        return {}
    from llm_at_home.quantization.gptq_checkpoint import MADE

    files = sorted(Path(folder).glob("*.safetensors"))
    names = {name for name, _ in linear_layers(model)}
    weights = sum(layer.in_features * layer.out_features for _, layer in linear_layers(model))
    linear = sum(
        size for file in files for tensor, size in tensor_sizes(file).items() if tensor.rpartition(".")[0] in names
    )
    found = {
        "checkpoint_size": Reading(sum(file.stat().st_size for file in files) / 1e9, "GB", METHOD),
        "bits_per_weight_on_disk": Reading(8 * linear / weights, "bits", METHOD),
    }
    made = Path(folder) / MADE
    if made.is_file():
        cost = json.loads(made.read_text())
        found["make_time"] = Reading(cost["seconds"], "s", "clock")
        found["make_resident_set_peak"] = Reading(cost["resident_set_peak"], "GB", "high_water_mark")
        if "torch_allocated_peak" in cost:
            found["make_torch_allocated_peak"] = Reading(cost["torch_allocated_peak"], "GB", "torch_allocator")
    return found


def tensor_sizes(file: Path) -> dict[str, int]:
    """Bytes of each tensor of a safetensors file, from its header alone."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return {
        name: entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }
