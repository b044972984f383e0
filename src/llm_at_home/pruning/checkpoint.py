"""Pruned checkpoints in transformers' format, made once and kept in the cache with what the making reached and cost."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.models import source
from llm_at_home.models.loading import load_config, load_tokenizer, load_weights
from llm_at_home.quantization.calibration import calibration_hash, calibration_texts
from llm_at_home.quantization.layers import linear_layers
from llm_at_home.records.cached import cached, cached_folder, is_made
from llm_at_home.records.hashing import package_versions

KIND = "pruned"
MADE = "pruning.json"
# What decides the weights; the kernel that multiplies with them does not.
SETTINGS = ("method", "sparsity", "pattern", "damping", "block_size")
# Raised whenever the same settings would give other weights.
VERSION = 1


def key(config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the weights depend on: the source, the method, the calibration text, the versions."""
    return {
        "source": source.identity(config["model"]),
        "settings": settings(config["prune"]),
        "calibration": calibration(config),
        "device": config["gpu"]["device"],
        "packages": package_versions(("torch", "transformers")),
        "version": VERSION,
    }


def settings(prune: Mapping[str, Any]) -> dict[str, Any]:
    """What of a ``prune`` group decides the weights, but for the calibration text; nothing where nothing is pruned."""
    return {name: prune[name] for name in SETTINGS if name in prune}


def calibration(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Hash of the calibration text and how much of each text counts, or None for a method that looks at none."""
    options = config["prune"].get("calibration")
    if options is None:
        return None
    texts = calibration_texts(options, config["seed"])
    return {"sha256": calibration_hash(texts), "texts": len(texts), "max_length": options["max_length"]}


def is_there(config: Mapping[str, Any]) -> bool:
    """Whether the cache has the checkpoint."""
    return is_made(KIND, key(config))


def folder(config: Mapping[str, Any]) -> Path:
    """Where the checkpoint is kept, whether it has been made or not."""
    return cached_folder(KIND, key(config))


def made(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the making left word of.

    ``seconds``, ``calibration_tokens``, ``weights`` and ``zeros`` (of the decoder's linear layers), and ``sparsity``,
    the share of zeros in each of these by name.
    """
    report: dict[str, Any] = json.loads((folder(config) / MADE).read_text(encoding="utf-8"))
    return report


def check_architecture(kind: str | None) -> None:
    """Refuse decoders whose linear weights may be kept elsewhere than in their layers' linear modules, as experts' are.

    Args:
        kind: the architecture's name, as transformers has it; None where it is not known yet.

    Raises:
        Refusal: naming those that can be pruned.
    """
    if kind is not None and kind not in source.PLAIN_DECODERS:
        known = ", ".join(source.PLAIN_DECODERS)
        raise Refusal(f"the decoder layers of {kind} are not known to pruning: use prune=none, or one of {known}")


def ensure(config: Mapping[str, Any]) -> Path:
    """The folder of the checkpoint, made now if it is not in the cache.

    Raises:
        Refusal: for a model that cannot be pruned by this method.
    """
    # Loading it also fetches what identifies a model of the hub.
    check_architecture(load_config(config["model"]).model_type)
    if not is_there(config):
        print(f"pruning {config['model']['name']} by {config['prune']['name']}, once", file=sys.stderr)
    return cached(KIND, key(config), lambda folder: _make(config, folder))


def _make(config: Mapping[str, Any], folder: Path) -> None:
    from llm_at_home.pruning.walk import prune_layers

    start = time.perf_counter()
    prune, options = config["prune"], config["prune"].get("calibration")
    tokenizer = load_tokenizer(config["model"])
    rows = []
    if options is not None:
        texts = calibration_texts(options, config["seed"])
        rows = [tokenizer(text)["input_ids"][: options["max_length"]] for text in texts]
    stored = str(load_config(config["model"]).dtype or "float32").removeprefix("torch.")
    model = load_weights(config["model"], stored, "cpu")
    prune_layers(model, rows, prune, config["gpu"]["device"])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report = {
        "seconds": time.perf_counter() - start,
        "calibration_tokens": sum(map(len, rows)),
        "weights": sum(layer.weight.numel() for _, layer in linear_layers(model)),
        "zeros": sum(int((layer.weight == 0).sum()) for _, layer in linear_layers(model)),
        "sparsity": sparsity_by_layer(model),
    }
    (folder / MADE).write_text(json.dumps(report), encoding="utf-8")


def sparsity_by_layer(model: Any) -> dict[str, float]:
    """The share of exact zeros in each linear layer of a dense model's decoder."""
    return {name: float((layer.weight == 0).float().mean()) for name, layer in linear_layers(model)}
