"""GPTQ, AWQ and EXL3 through GPTQModel: checkpoints read as published, or made here from calibration text.

GPTQModel is the maintained heir of AutoGPTQ and AutoAWQ, which are archived and do not import beside transformers 5;
the checkpoints of both load. Frantar et al. 2022 (GPTQ), Lin et al. 2023 (AWQ).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.models import source
from llm_at_home.quantization import calibration, gptq_kernels

BITS = {"gptq": (2, 3, 4, 8), "awq": (4,), "exl3": (2, 3, 4, 5, 6, 8)}
GROUP_SIZES = (16, 32, 64, 128)
# Bits among which mixed precision chooses for each layer.
MIXED_BITS = (2, 3, 4, 8)


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
    gptq_kernels.kernel_for(config, [quant["bits"]] if quant["bits"] else MIXED_BITS)
    if quant.get("target_bits") is not None:
        _check_target(quant)
    if config["model"]["weights"] == "random":
        if algorithm == "exl3" or quant.get("target_bits") is not None:
            hint = "use quant=gptq, whose packed tensors can be random"
            raise Refusal(f"quant={name} is made by looking at real weights, which random ones are not: {hint}")
    elif source.quantized_as(config["model"]) is None:
        calibration.refuse_overlap(quant["calibration"], config)


def _check_exl3(config: Mapping[str, Any]) -> None:
    if config["gpu"]["device"] != "cuda":
        raise Refusal("quant=exl is made and run by ExLlama's CUDA kernels: use gpu=cuda, or quant=gptq_mixed on a CPU")
    if shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME"):
        raise Refusal("quant=exl compiles its kernels with nvcc, which is not here: install it, or use quant=gptq")
    if _trains(config, "adapter"):
        raise Refusal("quant=exl passes no gradients: use quant=gptq or quant=nf4 to train on")


def _check_target(quant: Mapping[str, Any]) -> None:
    from llm_at_home.quantization.mixed_bits import stored_bits

    low, high = (stored_bits(bits, quant["group_size"]) for bits in (MIXED_BITS[0], MIXED_BITS[-1]))
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
    from llm_at_home.models.loading import load_config, location
    from llm_at_home.quantization import gptq_checkpoint

    published = getattr(load_config(config["model"]), "quantization_config", None)
    if published is None:
        return str(gptq_checkpoint.ensure(config))
    check_published(config["quant"], published)
    return location(config["model"])


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
    bits = published.get("bits", published.get("w_bit"))
    if quant["bits"] is not None and bits is not None and int(bits) != quant["bits"]:
        raise Refusal(f"the checkpoint has {bits} bits: give quant.bits={bits}")
