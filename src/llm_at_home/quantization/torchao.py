"""torchao: 8- and 4-bit integers that PyTorch's own kernels multiply with, quantized while the weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.hardware.device import check_kernel
from llm_at_home.models import source
from llm_at_home.models.loading import load_config, load_weights

ACTIVATIONS = ("none", "dynamic")
ALGORITHMS = ("tinygemm", "hqq")
# What PyTorch's int4 kernels take: on the CPU, and on a GPU.
GROUP_SIZES = {"cpu": (32, 64, 128), "cuda": (32, 64, 128, 256)}


def check(config: Mapping[str, Any]) -> None:
    """Refuse settings that do not exist, kernels that are not there, and training that would go wrong.

    Raises:
        Refusal: with one line that says what to change.
    """
    quant = config["quant"]
    if quant["bits"] == 8 and "activation" in quant:
        _check_int8(config)
    elif quant["bits"] == 4 and "group_size" in quant:
        _check_int4(config)
    else:
        hint = "use quant=int8_torchao or quant=int4_torchao"
        raise Refusal(f"quant.bits={quant['bits']} is not to be had with quant={quant['name']}: {hint}")
    if config.get("adapter", {}).get("trains") == "all":
        hint = "use adapter=lora or quant=none"
        raise Refusal(f"quant={quant['name']} adapter=full cannot train, since integers take no gradients: {hint}")


def _check_int8(config: Mapping[str, Any]) -> None:
    quant = config["quant"]
    if quant["activation"] not in ACTIVATIONS:
        raise Refusal(f"quant.activation={quant['activation']} is unknown: choose one of {', '.join(ACTIVATIONS)}")
    if quant["activation"] == "dynamic":
        check_kernel(config["gpu"], (7, 5), "8-bit products")
        if _trains_adapter(config):
            # torch._int_mm has no derivative: the output of such a layer is cut off from its input without an error.
            raise Refusal("quant.activation=dynamic passes no gradients on: train with quant.activation=none")


def _check_int4(config: Mapping[str, Any]) -> None:
    quant, gpu = config["quant"], config["gpu"]
    size, sizes = quant["group_size"], GROUP_SIZES[gpu["device"]]
    if quant["algorithm"] not in ALGORITHMS:
        raise Refusal(f"quant.algorithm={quant['algorithm']} is unknown: choose one of {', '.join(ALGORITHMS)}")
    if size not in sizes:
        known = ", ".join(map(str, sizes))
        raise Refusal(f"quant.group_size={size} has no int4 kernel here: choose one of {known}")
    source.check_group_size(config["model"], size)
    check_kernel(gpu, (8, 0), "torchao's int4")
    if config["dtype"] != "bfloat16":
        # On the CPU the kernel also takes the other two, in a scalar loop that is slower by orders of magnitude.
        raise Refusal(f"quant={quant['name']} has a fast kernel in bfloat16 only: use dtype=bfloat16")
    if _trains_adapter(config):
        hint = "use quant=nf4 or quant=int8_torchao"
        raise Refusal(f"quant={quant['name']} cannot train adapters, since its kernel has no derivative: {hint}")


def _trains_adapter(config: Mapping[str, Any]) -> bool:
    return config.get("adapter", {}).get("trains") == "adapter"


def load(config: Mapping[str, Any]) -> Any:
    """The quantized model; the output head and embeddings stay in ``dtype``.

    Each matrix is quantized as it arrives on the device, so that the model is never there unquantized as a whole.
    """
    from transformers import TorchAoConfig

    quantization = TorchAoConfig(scheme(config["quant"], config["gpu"]["device"]))
    if config["model"]["weights"] == "random":
        return _random(config, quantization)
    return load_weights(config["model"], config["dtype"], config["gpu"]["device"], quantization_config=quantization)


def scheme(quant: Mapping[str, Any], device: str) -> Any:
    """torchao's configuration for the ``quant`` group.

    The packing of 4-bit codes is chosen by device, such that PyTorch's own ``_weight_int4pack_mm`` multiplies: the
    default packing needs the package mslk, others are for Intel's and Huawei's devices.

    Args:
        quant: the group.
        device: ``cpu`` or ``cuda``.
    """
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int4WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    # torchao would otherwise tune torch.compile for the whole process, which is the engine's affair.
    options: dict[str, Any] = {"set_inductor_config": False}
    if quant["bits"] == 8:
        kind = Int8DynamicActivationInt8WeightConfig if quant["activation"] == "dynamic" else Int8WeightOnlyConfig
        return kind(**options)
    options |= {"group_size": quant["group_size"], "int4_choose_qparams_algorithm": quant["algorithm"]}
    if device == "cpu":
        return PrototypeInt4WeightOnlyConfig(**options)
    return Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d", **options)


def _random(config: Mapping[str, Any], quantization: Any) -> Any:
    """Random weights, quantized layer by layer as transformers does with those it reads."""
    import torch
    from torchao.quantization import quantize_
    from transformers.quantizers.auto import AutoHfQuantizer

    from llm_at_home.models import random_weights
    from llm_at_home.quantization.layers import linear_layers

    class Pending(torch.nn.Linear):
        """A layer that waits for its weight; torchao keeps a layer's class, so only this tells it from the head."""

    def replace(model: Any) -> None:
        for _, layer in linear_layers(model):
            layer.__class__ = Pending

    def fill(layer: Any, weight: torch.Tensor) -> None:
        layer.__class__ = torch.nn.Linear
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        quantize_(layer, quantization.quant_type)

    model = random_weights.build(
        load_config(config["model"]),
        getattr(torch, config["dtype"]),
        config["gpu"]["device"],
        random_weights.Quantized(replace, (Pending,), fill),
    )
    # Where PEFT looks for what it needs to quantize again after merging.
    model.hf_quantizer = AutoHfQuantizer.from_config(quantization)
    model.config.quantization_config = quantization
    return model
