"""GPTQ, AWQ and EXL3 through GPTQModel: checkpoints read as published, or made here from calibration text.

GPTQModel is the maintained heir of AutoGPTQ and AutoAWQ, which are archived and do not import beside transformers 5;
the checkpoints of both load. Frantar et al. 2022 (GPTQ), Lin et al. 2023 (AWQ).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.models import source
from llm_at_home.quantization import calibration, gptq_kernels, mixed_bits

BITS = {"gptq": (2, 3, 4, 8), "awq": (4,), "exl3": (2, 3, 4, 5, 6, 8)}
GROUP_SIZES = (16, 32, 64, 128)
# What the making of a format divides a layer's inputs and outputs into.
TILES = {"awq": (1, 64), "exl3": (128, 128)}


# GPTQModel drops texts of ten tokens and fewer.
SHORTEST_TEXT = 16


def check(config: Mapping[str, Any]) -> None:
    """Refuse settings that do not exist, kernels that cannot, and calibration on text that is measured on.

    Raises:
        Refusal: with one line that says what to change.
    """
    quant = config["quant"]
    name, algorithm = quant["name"], quant["algorithm"]
    if quant["bits"] is not None and quant["bits"] not in BITS[algorithm]:
        choices = ", ".join(map(str, BITS[algorithm]))
        raise Refusal(f"quant.bits={quant['bits']} is not to be had with quant={name}: choose one of {choices}")
    if algorithm != "exl3" and quant["group_size"] not in GROUP_SIZES:
        choices = ", ".join(map(str, GROUP_SIZES))
        raise Refusal(f"quant.group_size={quant['group_size']} is unknown to the kernels: choose one of {choices}")
    if _trains(config, "all"):
        raise Refusal(
            f"quant={name} adapter=full cannot train, since codes take no gradients: use adapter=lora or quant=none"
        )
    if algorithm == "exl3":
        _check_exl3(config)
    gptq_kernels.kernel_for(config, [quant["bits"]] if quant["bits"] else mixed_bits.CHOICES)
    stored = source.stored_quantization(config["model"])
    if stored is not None:
        check_published(quant, stored)
        return
    if algorithm != "exl3":
        source.check_group_size(config["model"], quant["group_size"])
    if quant.get("target_bits") is not None:
        _check_target(quant)
    elif quant["bits"] is None:
        raise Refusal(
            f"quant={name} has no number of bits: give quant.bits, or use quant=gptq_mixed quant.target_bits=4"
        )
    if config["model"]["weights"] == "random":
        if algorithm == "exl3" or quant.get("target_bits") is not None:
            hint = "use quant=gptq, whose packed tensors can be random"
            raise Refusal(f"quant={name} is made by looking at real weights, which random ones are not: {hint}")
    else:
        _check_tiles(config)
        if quant["calibration"]["max_length"] < SHORTEST_TEXT:
            raise Refusal(f"quant.calibration.max_length is too small: give at least {SHORTEST_TEXT}")
        calibration.refuse_overlap(quant["calibration"], config)


def complete(config: dict[str, Any], named: Collection[str]) -> None:
    """Take the settings of a checkpoint that is read as it is, where the user named no others.

    Args:
        config: being resolved; its ``quant`` group is changed in place.
        named: the keys that the user gave.
    """
    stored = source.stored_quantization(config["model"])
    if stored is None:
        return
    quant = config["quant"]
    quant |= {k: v for k, v in stored_settings(stored).items() if k in quant and f"quant.{k}" not in named}
    if "target_bits" in quant:
        quant["target_bits"] = None  # nothing is chosen any more


def _check_tiles(config: Mapping[str, Any]) -> None:
    name, algorithm = config["quant"]["name"], config["quant"]["algorithm"]
    into, out = TILES.get(algorithm, (1, 1))
    odd = [size for size in source.widths(config["model"]) if size % into]
    odd += [size for size in source.outputs(config["model"]) if size % out]
    if odd:
        hint = "use quant=gptq"
        raise Refusal(f"quant={name} needs layers of multiples of {max(into, out)}, and one has {min(odd)}: {hint}")


def _check_exl3(config: Mapping[str, Any]) -> None:
    if config["gpu"]["device"] != "cuda":
        raise Refusal("quant=exl is made and run by ExLlama's CUDA kernels: use gpu=cuda, or quant=gptq_mixed on a CPU")
    if shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME"):
        raise Refusal("quant=exl compiles its kernels with nvcc, which is not here: install it, or use quant=gptq")
    if _trains(config, "adapter"):
        raise Refusal("quant=exl passes no gradients: use quant=gptq or quant=nf4 to train on")


def _check_target(quant: Mapping[str, Any]) -> None:
    low, high = (mixed_bits.stored_bits(f(mixed_bits.CHOICES), quant["group_size"]) for f in (min, max))
    if not low <= quant["target_bits"] <= high:
        raise Refusal(
            f"quant.target_bits={quant['target_bits']} is out of reach: with groups of {quant['group_size']}, scales "
            f"included, choose between {low:.2f} and {high:.2f}"
        )


def _trains(config: Mapping[str, Any], what: str) -> bool:
    return config.get("adapter", {}).get("trains") == what


def load(config: Mapping[str, Any]) -> Any:
    """The quantized model: read where the source is a quantized checkpoint, else made once and kept in the cache.

    Raises:
        Refusal: when the checkpoint that ``model=`` names was quantized otherwise than the configuration says.
    """
    from llm_at_home.quantization import gptq_checkpoint, gptq_random

    if config["model"]["weights"] == "random":
        return gptq_random.build(config)
    return gptq_checkpoint.read(ensure(config), config)


def ensure(config: Mapping[str, Any]) -> str:
    """The folder of the checkpoint: the source itself where it is one, else made now if the cache lacks it.

    Raises:
        Refusal: when the source is quantized otherwise than the configuration says.
    """
    from llm_at_home.models.loading import fetched, load_config
    from llm_at_home.quantization import gptq_checkpoint

    published = getattr(load_config(config["model"]), "quantization_config", None)
    if published is None:
        return str(gptq_checkpoint.ensure(config))
    check_published(config["quant"], published)
    return fetched(config["model"])


def needs_making(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint must be made first: it is not in the cache, and the source is none."""
    from llm_at_home.quantization import gptq_checkpoint

    if config["model"]["weights"] == "random" or source.quantized_as(config["model"]):
        return False
    return not gptq_checkpoint.is_there(config)


def check_published(quant: Mapping[str, Any], published: Mapping[str, Any]) -> None:
    """Refuse to call a checkpoint something else than it is.

    Args:
        quant: the ``quant`` group.
        published: ``quantization_config`` of the checkpoint.

    Raises:
        Refusal: naming what the checkpoint is.
    """
    method = str(published.get("quant_method", "")).lower()
    if method != quant["algorithm"]:
        raise Refusal(f"the checkpoint was quantized by {method}: use quant={'exl' if method == 'exl3' else method}")
    for key, value in stored_settings(published).items():
        if key in quant and quant[key] != value:
            shown = "null" if value is None else str(value).lower()
            raise Refusal(f"the checkpoint has {key}={shown} and not {quant[key]}: give quant.{key}={shown}")


def stored_settings(published: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the ``quant`` group as a checkpoint's ``quantization_config`` has them.

    ``bits`` is None where layers have different ones. AutoAWQ says ``zero_point`` where AutoGPTQ says ``sym``.
    """
    mixed = any("bits" in rule for rule in (published.get("dynamic") or {}).values())
    found = {"bits": None if mixed else published.get("bits", published.get("w_bit"))}
    found["group_size"] = published.get("group_size", published.get("q_group_size"))
    found = {key: value for key, value in found.items() if value is not None or (key == "bits" and mixed)}
    symmetric = published.get("sym", not published["zero_point"] if "zero_point" in published else None)
    if symmetric is not None:
        found["sym"] = symmetric
    if "desc_act" in published:
        found["desc_act"] = bool(published["desc_act"])
    return found
