"""Writes a Llama-architecture transformers model as a ``.gguf`` file that llama.cpp computes the same from.

The Python package ``gguf`` quantizes the types that need no search; llama.cpp itself makes the K and IQ types from a
file written here.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.quantization.gguf_vocab import HINT, add_vocabulary

# Raised whenever the same model and type would give another file.
WRITER = 1
DENSE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ROPE_TYPES = ("default", "linear", "llama3")


def check_architecture(shape: Mapping[str, Any]) -> None:
    """Refuse what the writer would write wrongly.

    Args:
        shape: the content of a transformers ``config.json``.

    Raises:
        Refusal: naming what it does not know.
    """
    rope = shape.get("rope_parameters") or shape.get("rope_scaling") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if shape.get("model_type") != "llama":
        raise Refusal(f"quant=gguf writes Llama models, and this one is {shape.get('model_type')}: {HINT}")
    if rope_type not in ROPE_TYPES:
        raise Refusal(f"quant=gguf does not write rotary embeddings of type {rope_type}: {HINT}")
    if shape.get("hidden_act", "silu") != "silu":
        raise Refusal(f"llama.cpp's Llama computes with silu, and this model with {shape['hidden_act']}: {HINT}")


def permute(weight: Any, heads: int) -> Any:
    """Rows of a query or key projection in llama.cpp's order.

    transformers rotates the first half of a head's channels against the second half; llama.cpp rotates neighbours.

    Args:
        weight: a tensor of shape (heads * head size, inputs), or a bias of shape (heads * head size,).
        heads: of queries or of keys.
    """
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def unpermute(weight: Any, heads: int) -> Any:
    """The inverse of :func:`permute`."""
    return weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def heads_of(name: str, config: Any) -> int | None:
    """How many heads the rows of this tensor (named as in transformers) are permuted in; None where they are not."""
    if ".q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj." in name else None


def file_name(name: str, layers: int) -> str:
    """llama.cpp's name of a transformers tensor."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    found = get_tensor_name_map(MODEL_ARCH.LLAMA, layers).get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise Refusal(f"llama.cpp's Llama has no tensor for {name}: {HINT}")
    return found


def write(path: Path, model: Any, tokenizer: Any, kind: str, name: str) -> None:
    """Write a model, tensor by tensor: beside it in memory is never more than one of them.

    Linear layers get the type. The output head, and embeddings that serve as one, stay at eight bits where the type
    has fewer, as llama.cpp itself does; norms and biases stay float32; a tensor whose rows are no whole number of
    blocks stays float16.

    Args:
        path: of the file to write.
        model: a transformers ``LlamaForCausalLM`` on the CPU.
        tokenizer: its fast tokenizer.
        kind: a type that the ``gguf`` package quantizes (``F32``, ``F16``, ``BF16``, ``Q8_0``, ``Q4_0``, ...).
        name: the model's name.

    Raises:
        Refusal: for an architecture or a tokenizer that is not known, or weights that a type cannot hold.
    """
    import numpy as np
    import torch
    from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType
    from gguf.quants import quant_shape_to_byte_shape, quantize

    config = model.config
    check_architecture(config.to_dict())
    writer = GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_name(name)
    _add_shape(writer, config)
    writer.add_file_type(LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    add_vocabulary(writer, tokenizer, config.vocab_size)

    tensors = {}
    for own, tensor in model.state_dict().items():
        if own == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensors[file_name(own, config.num_hidden_layers)] = (own, tensor)
    factors = _rope_factors(model)
    if factors is not None:
        tensors["rope_freqs.weight"] = ("", factors)
    kinds = {found: _kind(found, tensor, kind, config) for found, (_, tensor) in tensors.items()}
    for found, (_, tensor) in tensors.items():
        stored = quant_shape_to_byte_shape(tensor.shape, kinds[found])
        writer.add_tensor_info(found, stored, np.dtype(np.uint8), math.prod(stored), kinds[found])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for found, (own, tensor) in tensors.items():
        heads = heads_of(own, config)
        values = tensor.detach().float()
        values = permute(values, heads) if heads else values
        if kinds[found].name == "F16" and values.abs().max() > torch.finfo(torch.float16).max:
            raise Refusal(f"{own} holds weights that float16 cannot: use type BF16 or F32")
        writer.write_tensor_data(quantize(values.contiguous().numpy(), kinds[found]))
    writer.close()


def _kind(name: str, tensor: Any, kind: str, config: Any) -> Any:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if tensor.ndim == 1:
        return GGMLQuantizationType.F32
    is_head = name == "output.weight" or (name == "token_embd.weight" and config.tie_word_embeddings)
    chosen = GGMLQuantizationType["Q8_0" if is_head and kind not in DENSE.values() else kind]
    whole = tensor.shape[-1] % GGML_QUANT_SIZES[chosen][0] == 0
    return chosen if whole else GGMLQuantizationType.F16


def _add_shape(writer: Any, config: Any) -> None:
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _rope_factors(model: Any) -> Any:
    """What scaled rotary frequencies (Llama 3.1, linear) were divided by, of shape (head size / 2,), or None."""
    import torch

    actual = model.model.rotary_emb.inv_freq.float()
    theta = model.config.rope_parameters["rope_theta"]
    exponents = torch.arange(actual.numel(), dtype=torch.float32) / actual.numel()
    factors = 1.0 / (theta**exponents) / actual
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else factors


def quantize_file(source: Path, target: Path, kind: str, threads: int | None = None) -> None:
    """Make a K or IQ type with llama.cpp's own quantizer.

    Args:
        source: an F32, F16 or BF16 file.
        target: of the file to write.
        kind: a type of llama.cpp's ``quantize`` that needs no importance matrix, such as ``Q4_K_M``.
        threads: None is one for each core.

    Raises:
        RuntimeError: when llama.cpp says no.
    """
    from gguf import LlamaFileType
    from llama_cpp import llama_cpp

    # Else two lines a tensor on the terminal; its levels are not llama.cpp's, and warnings come as errors.
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = int(LlamaFileType[f"MOSTLY_{kind}"])
    options.nthread = threads or os.cpu_count() or 1
    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(options))
    if code:
        raise RuntimeError(f"llama.cpp's quantizer failed on {kind} with code {code}")
