"""How many bits a weight really takes in memory, scales and tables included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llm_at_home.quantization.checkpoint_size import checkpoint_readings
from llm_at_home.quantization.layers import linear_layers
from llm_at_home.records.schema import Reading

METHOD = "tensors_in_memory"


def size_readings(model: Any) -> dict[str, Reading]:
    """``bits_per_weight`` of the decoder's linear layers, and ``model_size`` of the whole model.

    The output head, embeddings and norms, which most methods leave as they are, count in ``model_size`` (GB) and
    ``bits_per_weight_whole_model`` only. Tied weights count once.
    """
    import torch

    file = getattr(model, "llm_at_home_gguf", None)
    if file is not None:
        from llm_at_home.quantization import gguf

        return gguf.size_readings(file)
    linear = {id(module) for _, module in linear_layers(model)}
    seen: set[int] = set()
    weights = linear_weights = linear_bytes = total_bytes = 0
    for module in model.modules():
        own = [tensor for tensor in _tensors(module) if tensor.data_ptr() not in seen]
        seen |= {tensor.data_ptr() for tensor in own}
        size = sum(tensor.numel() * tensor.element_size() for tensor in own)
        total_bytes += size
        if id(module) in linear:
            linear_weights += module.in_features * module.out_features
            linear_bytes += size
            weights += module.in_features * module.out_features
        else:
            weights += sum(tensor.numel() for tensor in own if isinstance(tensor, torch.nn.Parameter))
    return {
        "bits_per_weight": Reading(8 * linear_bytes / linear_weights, "bits", METHOD),
        "bits_per_weight_whole_model": Reading(8 * total_bytes / weights, "bits", METHOD),
        "model_size": Reading(total_bytes / 1e9, "GB", METHOD),
        **checkpoint_readings(model),
    }


def _tensors(module: Any) -> list[Any]:
    """Every tensor that a module keeps itself: bitsandbytes' quantization states, what torchao's weights hold, and what
    GPTQModel's kernels keep as plain attributes once they have repacked a weight."""
    import torch

    kept = [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False), *kept]
    found = [inner for tensor in own for inner in _flat(tensor)]
    for parameter in own:
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        # The tensors themselves and not as_dict(), which copies some: tables shared between layers count once.
        tables = [getattr(one, name, None) for one in (state, nested) for name in ("absmax", "code", "offset")]
        found += [table for table in (*tables, getattr(parameter, "SCB", None)) if isinstance(table, torch.Tensor)]
    return found


def _flat(tensor: Any) -> Iterator[Any]:
    """The tensors that have memory: a wrapper subclass such as torchao's has a shape, and keeps others inside."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _flat(getattr(tensor, name))
