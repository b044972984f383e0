"""What cannot be made ahead of its use: quantized, pruned and merged checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.models import source
from llm_at_home.pruning import base as pruning
from llm_at_home.pruning import checkpoint as pruned
from llm_at_home.pruning.naming import prune_words
from llm_at_home.quantization import base, gguf
from llm_at_home.records import store


def check_quantize(config: Mapping[str, Any]) -> None:
    """Refuse where there is no checkpoint to make."""
    if not hasattr(base.method_of(config["quant"]), "ensure"):
        raise Refusal(f"quant={config['quant']['name']} is quantized while it loads: there is nothing to make")
    if config["model"]["weights"] == "random":
        raise Refusal("random weights are quantized while they load: use model.weights=pretrained")
    if source.quantized_as(config["model"]):
        raise Refusal("model.source is quantized already: there is nothing to make")


def check_prune(config: Mapping[str, Any]) -> None:
    """Refuse where there is nothing to prune."""
    if not pruning.is_pruned(config):
        raise Refusal("prune=none prunes nothing: choose prune=magnitude, wanda or sparsegpt")
    if config["model"]["weights"] == "random":
        raise Refusal("random weights are pruned while they load: use model.weights=pretrained")


def check_merge(config: Mapping[str, Any]) -> None:
    """Refuse what merging would round away or cannot write."""
    if config["quant"]["method"] != "dense":
        raise Refusal(
            f"merging into quant={config['quant']['name']} would round the update away: merge with quant=none, and "
            "quantize the merged model (model.source=FOLDER)"
        )
    if config["model"]["weights"] == "random":
        raise Refusal("random weights have nothing to be merged with: use model.weights=pretrained")
    trained_on = _training_config(config["adapter_path"]).get("prune", config["prune"])
    if pruned.settings(trained_on) != pruned.settings(config["prune"]):
        hint = "merge with the prune= of its training; the merged weights are dense again"
        raise Refusal(f"the adapter was trained on prune={', '.join(prune_words(trained_on)) or 'none'}: {hint}")
    if not config["out"]:
        raise Refusal("out= names no folder: give one that does not exist yet")
    if Path(config["out"]).exists():
        raise Refusal(f"out={config['out']} exists: give a folder that does not")
    if config["gguf"]:
        if config["gguf"] not in gguf.WRITTEN:
            raise Refusal(f"gguf={config['gguf']} is not written by Python: choose one of {', '.join(gguf.WRITTEN)}")
        gguf.check_model(config["model"])


def _training_config(adapter_path: str) -> Mapping[str, Any]:
    """The configuration of the training run that an adapter comes from; empty where its folder is no run's."""
    for folder in (Path(adapter_path), Path(adapter_path).parent):
        with contextlib.suppress(Refusal):
            return store.load(folder).config
    return {}
