"""Loads the base of a configuration pruned: from a checkpoint in the model's place, quantized as ``quant=`` says."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.hardware.device import check_kernel
from llm_at_home.models import source
from llm_at_home.pruning import checkpoint
from llm_at_home.pruning.pattern import UNSTRUCTURED, Pattern
from llm_at_home.quantization import base, calibration
from llm_at_home.records.schema import Reading

METHODS = ("magnitude", "wanda", "sparsegpt")
DENSE, SEMI_STRUCTURED = "dense", "semi_structured"
# Whose codes hold an exact zero, and which are made while the model loads: by method, and by the bits that do.
KEEPS_ZEROS: dict[str, tuple[int | None, ...]] = {"dense": (None,), "bitsandbytes": (4, 8), "rtn": (2, 3, 4, 8)}
KEEPS_ZEROS["torchao"] = (8,)
# Ways in which PEFT starts a LoRA from parts of the base's weights, which it takes out of them.
TAKES_APART = ("pissa", "olora", "corda", "eva", "loftq")
SHORTEST_TEXT = 16


def is_pruned(config: Mapping[str, Any]) -> bool:
    """Whether a resolved configuration asks for a pruned base."""
    return config.get("prune", {}).get("name", "none") != "none"


def complete(config: dict[str, Any], named: Collection[str]) -> None:
    """A pattern n:m decides the sparsity, which the record is then to name.

    Args:
        config: being resolved; changed in place.
        named: the keys that the user gave.

    Raises:
        Refusal: when the user named another sparsity.
    """
    if not is_pruned(config) or config["prune"]["pattern"] == UNSTRUCTURED:
        return
    sparsity = Pattern.of(config["prune"]).sparsity
    if "prune.sparsity" in named and config["prune"]["sparsity"] != sparsity:
        raise Refusal(
            f"prune.pattern={config['prune']['pattern']} is a sparsity of {sparsity:g} and not of "
            f"{config['prune']['sparsity']}: leave out one of the two"
        )
    config["prune"]["sparsity"] = sparsity


def check(config: Mapping[str, Any]) -> None:
    """Refuse, before anything loads, what cannot be pruned or would not stay so.

    Raises:
        Refusal: with one line that says what to change.
    """
    if not is_pruned(config):
        return
    prune, model = config["prune"], config["model"]
    if prune["method"] not in METHODS:
        raise Refusal(f"prune.method={prune['method']} is unknown: choose one of {', '.join(METHODS)}")
    pattern = Pattern.of(prune)
    odd = [width for width in sorted(source.widths(model)) if pattern.group and width % pattern.group]
    if odd:
        raise Refusal(
            f"prune.pattern={prune['pattern']} does not divide {model['name']}'s layers of {odd[0]} inputs: use "
            "prune.pattern=unstructured"
        )
    checkpoint.check_architecture(source.model_type(model))
    if source.quantized_as(model):
        raise Refusal(
            f"{model['source']} is quantized, and dense weights are pruned: use prune=none, or the dense model"
        )
    _check_made(config, pattern)
    if "quant" in config:
        _check_quant(config)
    _check_kernel(config)
    if "adapter" in config:
        _check_adapter(config)


def _check_made(config: Mapping[str, Any], pattern: Pattern) -> None:
    prune, options = config["prune"], config["prune"].get("calibration")
    if config["model"]["weights"] == "random":
        if options is not None:
            raise Refusal(f"prune={prune['name']} looks at what real weights do: use prune=magnitude with random ones")
        if config.get("quant", {}).get("method", "dense") != "dense":
            raise Refusal("random weights are pruned dense or not at all: use quant=none, or prune=none")
    if options is not None:
        if options["max_length"] < SHORTEST_TEXT:
            raise Refusal(f"prune.calibration.max_length is too small: give at least {SHORTEST_TEXT}")
        if options["limit"] is not None and options["limit"] < 1:
            raise Refusal("prune.calibration.limit leaves no text: give at least 1, or null for all")
        calibration.refuse_overlap(options, config, group="prune")
    if prune["method"] == "sparsegpt":
        if prune["damping"] < 0:
            raise Refusal(f"prune.damping={prune['damping']} is negative: give 0.01, or more where that fails")
        if prune["block_size"] < 1 or (pattern.group and prune["block_size"] % pattern.group):
            raise Refusal(
                f"prune.block_size={prune['block_size']} holds no whole groups of {prune['pattern']}: give a multiple "
                f"of {max(pattern.group, 1)}"
            )


def _check_quant(config: Mapping[str, Any]) -> None:
    quant = config["quant"]
    if quant["bits"] not in KEEPS_ZEROS.get(quant["method"], ()):
        raise Refusal(
            f"quant={quant['name']} does not keep the zeros of prune={config['prune']['name']} as they are: use "
            "quant=none, nf4, int8, int8_torchao or rtn, or quantize what `make prune` makes with model.source=FOLDER"
        )


def _check_kernel(config: Mapping[str, Any]) -> None:
    prune = config["prune"]
    if prune["kernel"] not in (DENSE, SEMI_STRUCTURED):
        raise Refusal(f"prune.kernel={prune['kernel']} is unknown: choose {DENSE} or {SEMI_STRUCTURED}")
    if prune["kernel"] == DENSE:
        return
    what = f"prune.kernel={SEMI_STRUCTURED}"
    if prune["pattern"] != "2:4":
        raise Refusal(f"{what} runs 2:4 alone: add prune.pattern=2:4, or use prune.kernel={DENSE}")
    if config.get("quant", {}).get("method", "dense") != "dense":
        raise Refusal(f"{what} takes weights that are not quantized: use quant=none, or prune.kernel={DENSE}")
    if "adapter" in config or config.get("adapter_path"):
        raise Refusal(f"{what} is for a base without adapters, since it passes no gradients: use prune.kernel={DENSE}")
    if config["gpu"]["device"] != "cuda":
        raise Refusal(f"{what} is run by a GPU's sparse tensor cores: use gpu=cuda, or prune.kernel={DENSE}")
    check_kernel(config["gpu"], (8, 0), "2:4 sparse products", f"use prune.kernel={DENSE}")
    if config["dtype"] not in ("float16", "bfloat16"):
        raise Refusal(f"{what} computes in 16 bits: use dtype=bfloat16 or float16, or prune.kernel={DENSE}")


def _check_adapter(config: Mapping[str, Any]) -> None:
    adapter, name = config["adapter"], config["prune"]["name"]
    if adapter["trains"] == "all":
        raise Refusal(f"adapter=full would train the zeros of prune={name} away: use adapter=lora, or prune=none")
    if adapter.get("loftq") or str(adapter.get("init_lora_weights", "")).lower().startswith(TAKES_APART):
        raise Refusal(
            f"adapter={adapter['name']} starts by taking the base's weights apart, and the zeros of prune={name} with "
            "them: use adapter=lora, or prune=none"
        )


def needs_making(config: Mapping[str, Any]) -> bool:
    """Whether a job of this resolved configuration needs a pruned checkpoint that is not in the cache yet."""
    if not is_pruned(config) or "model" not in config or config["model"]["weights"] == "random":
        return False
    return not checkpoint.is_there(config)


def effective(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with the pruned checkpoint in the model's place, made now if the cache lacks it.

    Where nothing is pruned, or the weights are random, it is the configuration itself.
    """
    if not is_pruned(config) or config["model"]["weights"] == "random":
        return config
    folder = {"source": str(checkpoint.ensure(config)), "revision": None, "architecture": None}
    return {**config, "model": {**config["model"], **folder, "use_safetensors": True}}


def load_base(config: Mapping[str, Any]) -> Any:
    """The base model of a resolved configuration, pruned and quantized as it says, in evaluation mode on its device.

    Raises:
        RuntimeError: when a quantization was asked for and plain linear layers are left in the decoder.
    """
    if not is_pruned(config):
        return base.load_base(config)
    from llm_at_home.pruning import semi_structured

    if config["model"]["weights"] == "random":
        return semi_structured.random_model(config)
    model = base.load_base(effective(config))
    if config["prune"]["kernel"] == SEMI_STRUCTURED:
        semi_structured.convert(model)
    return model


def readings(config: Mapping[str, Any]) -> dict[str, Reading]:
    """``sparsity``, the share of zeros among the decoder's linear weights, and ``pruning_time`` (s), as they were made.

    Nothing where nothing is pruned, where weights are random, or before the checkpoint is there.
    """
    if not _has_checkpoint(config):
        return {}
    made = checkpoint.made(config)
    layers = len(made["sparsity"])
    return {
        "sparsity": Reading(made["zeros"] / made["weights"], "1", "zeros_counted_in_the_checkpoint", n=layers),
        "pruning_time": Reading(made["seconds"], "s", "clock"),
    }


def provenance(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of the pruned checkpoint: its folder's name, calibration text, and each layer's sparsity."""
    if not _has_checkpoint(config):
        return {}
    made = checkpoint.made(config)
    found = {"checkpoint": checkpoint.folder(config).name, "calibration": checkpoint.calibration(config)}
    return {"pruning": found | {key: made[key] for key in ("calibration_tokens", "sparsity")}}


def _has_checkpoint(config: Mapping[str, Any]) -> bool:
    return is_pruned(config) and config["model"]["weights"] != "random" and checkpoint.is_there(config)
