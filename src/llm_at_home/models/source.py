"""Which model a configuration means and what identifies its content; nothing heavy is imported here."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.models.embedded import CONVERSION, WEIGHTS, gguf_path
from llm_at_home.paths import cache_dir

EMBEDDED = "embedded"
EMBEDDED_SHAPE = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
# Architectures whose linear layers read the residual stream, the attention's output or the MLP's inner channels.
PLAIN_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "phi3", "olmo2", "granite")


def check(model: Mapping[str, Any]) -> None:
    """Refuse a model that cannot be loaded, as far as that can be told without loading.

    Raises:
        Refusal: for an unknown ``weights``, a folder that is none, pickled weights, or a model that is not in the
            hub's cache while the hub is switched off.
    """
    source, weights = model["source"], model["weights"]
    if weights not in ("pretrained", "random"):
        raise Refusal(f"model.weights={weights} is unknown: choose pretrained or random")
    if weights == "random" and model["architecture"]:
        return
    if source == EMBEDDED:
        gguf_path()
        return
    folder = Path(source).expanduser()
    if is_gguf(source):
        if not folder.is_file():
            raise Refusal(f"there is no file {source}: mend quant.path or model.source")
    elif folder.is_dir():
        _check_folder(folder, weights, model["use_safetensors"])
    elif source.startswith(("/", "./", "../", "~")):
        raise Refusal(f"model.source={source} is not a folder: give one in transformers' format, or a hub id")
    elif hub_is_off() and hub_commit(source, model["revision"]) is None:
        raise Refusal(
            f"{source} is not in the local hub cache and HF_HUB_OFFLINE is set: unset it, or give model.source=FOLDER"
        )


def is_gguf(source: str) -> bool:
    """Whether a source is a file of llama.cpp's, which ``quant=gguf`` alone can read."""
    return source.lower().endswith(".gguf")


def _check_folder(folder: Path, weights: str, use_safetensors: bool) -> None:
    if not (folder / "config.json").is_file():
        raise Refusal(f"{folder} holds no config.json: give a folder that save_pretrained() wrote")
    if weights == "random":
        return
    if not any(folder.glob("*.safetensors")):
        if use_safetensors and any(folder.glob("*.bin")):
            hint = "convert them, or trust them with model.use_safetensors=false"
            raise Refusal(f"{folder} holds pickled weights only: {hint}")
        if not any(folder.glob("*.bin")):
            raise Refusal(f"{folder} holds no weights (*.safetensors)")


def quantized_as(model: Mapping[str, Any]) -> str | None:
    """The method by which the weights are quantized already, or None, also where the hub's are not downloaded yet."""
    if is_gguf(model["source"]):
        return "gguf"
    stored = stored_quantization(model)
    return str(stored.get("quant_method") or "quantized").lower() if stored else None


def stored_quantization(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """``quantization_config`` of a checkpoint in transformers' format, or None, also where it is not downloaded yet."""
    if model["weights"] == "random" or model["source"] == EMBEDDED:
        return None
    return _config(model).get("quantization_config") or None


def hub_is_off() -> bool:
    """Whether the environment forbids the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def hub_commit(source: str, revision: str | None) -> str | None:
    """The commit of a hub model as the local hub cache holds it, or None."""
    cache = _hub_folder(source)
    reference = cache / "refs" / (revision or "main")
    if reference.is_file():
        return reference.read_text().strip()
    return revision if revision and (cache / "snapshots" / revision).is_dir() else None


def _hub_folder(source: str) -> Path:
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(os.environ.get("HF_HOME") or user_cache / "huggingface").expanduser()
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{source.replace('/', '--')}"


def shape(model: Mapping[str, Any]) -> dict[str, Any]:
    """The model's configuration as its ``config.json`` has it, without loading; empty where none is known.

    The group's ``architecture`` counts for random weights, and for a source that is not on this machine yet.
    """
    architecture = model["architecture"]
    if architecture and model["weights"] == "random":
        return dict(architecture)
    known = EMBEDDED_SHAPE if model["source"] == EMBEDDED else _config(model)
    return dict(known or architecture or {})


def widths(model: Mapping[str, Any]) -> frozenset[int]:
    """How many inputs the decoder's linear layers have, as far as that can be told without loading; else empty."""
    return _widths_and_outputs(model)[0]


def outputs(model: Mapping[str, Any]) -> frozenset[int]:
    """How many outputs the decoder's linear layers have, as far as that can be told without loading; else empty."""
    return _widths_and_outputs(model)[1]


def _widths_and_outputs(model: Mapping[str, Any]) -> tuple[frozenset[int], frozenset[int]]:
    known = shape(model)
    sizes: list[Any] = [known.get(key) for key in ("hidden_size", "intermediate_size", "num_attention_heads")]
    if known.get("model_type") not in PLAIN_DECODERS or not all(sizes):
        return frozenset(), frozenset()
    stream, inner, heads = sizes
    head = known.get("head_dim") or stream // heads
    values = (known.get("num_key_value_heads") or heads) * head
    return frozenset({stream, inner, heads * head}), frozenset({stream, inner, heads * head, values})


def model_type(model: Mapping[str, Any]) -> str | None:
    """The architecture's name, as transformers has it, as far as it can be told without loading; else None."""
    name = shape(model).get("model_type")
    return str(name) if name else None


def check_group_size(model: Mapping[str, Any], size: int) -> None:
    """Refuse a group size that leaves a remainder in one of the model's layers.

    Raises:
        Refusal: naming the layers' width.
    """
    known = widths(model)
    for width in sorted(known):
        if width % size:
            raise Refusal(
                f"quant.group_size={size} does not divide {model['name']}'s layers of {width} inputs: "
                f"give a divisor of {math.gcd(*known)}"
            )


def _config(model: Mapping[str, Any]) -> dict[str, Any]:
    """The model's config.json, in its folder or in the hub's cache; empty where there is none yet."""
    folder = Path(model["source"]).expanduser()
    if not folder.is_dir():
        commit = hub_commit(model["source"], model["revision"])
        folder = _hub_folder(model["source"]) / "snapshots" / str(commit)
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def identity(model: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies the weights: a file hash, a hub commit, or the architecture of random weights."""
    source = model["source"]
    if model["weights"] == "random":
        shape = model["architecture"] or (
            {"gguf": remembered_hash(gguf_path())} if source == EMBEDDED else {"config": _config_text(source)}
        )
        return {"weights": "random", "architecture": shape}
    if source == EMBEDDED:
        return {"weights": WEIGHTS, "conversion": CONVERSION, "sha256": remembered_hash(gguf_path())}
    folder = Path(source).expanduser()
    if is_gguf(source):
        return {"file": folder.name, "sha256": remembered_hash(folder)}
    if folder.is_dir():
        return {"folder": str(folder.resolve()), "sha256": _folder_identity(folder)}
    return {"hub": source, "commit": hub_commit(source, model["revision"]) or "not downloaded yet"}


def _config_text(source: str) -> str:
    path = Path(source).expanduser() / "config.json"
    return path.read_text() if path.is_file() else source


def _folder_identity(folder: Path) -> str:
    """Names, sizes and times of the weights, and the configuration's content: hashing 13 GB would cost a minute."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".bin", ".jinja")):
        stat = path.stat()
        digest.update(f"{path.name}\0{stat.st_size}\0".encode())
        digest.update(path.read_bytes() if path.suffix == ".json" else str(stat.st_mtime_ns).encode())
    return digest.hexdigest()


def remembered_hash(path: Path) -> str:
    """SHA-256 of a large file, remembered beside its size and time so that it is read once."""
    from llm_at_home.records.hashing import file_hash
    from llm_at_home.records.store import write_json

    stat = path.stat()
    memory = cache_dir() / "hashes" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.json"
    seen = [stat.st_size, stat.st_mtime_ns]
    if memory.is_file():
        known = json.loads(memory.read_text())
        if known["seen"] == seen:
            return known["sha256"]
    value = file_hash(path)
    write_json(memory, {"path": str(path), "seen": seen, "sha256": value})
    return value
