"""bitsandbytes: LLM.int8() and the 4-bit types of QLoRA, quantized while the weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.hardware.device import check_kernel
from llm_at_home.models.loading import load_config, load_weights

TYPES = ("nf4", "fp4")


def check(config: Mapping[str, Any]) -> None:
    """Refuse what cannot work.

    Raises:
        Refusal: for bits that are not the method's, and full fine-tuning, whose gradients integers cannot take.
    """
    quant, bits = config["quant"]["name"], config["quant"]["bits"]
    options = config["quant"]["config"]
    own = 4 if options.get("load_in_4bit") else 8
    if bits != own:
        raise Refusal(f"quant.bits={bits} changes nothing of quant={quant}, which has {own}: leave it out, or use rtn")
    kind, threshold = options.get("bnb_4bit_quant_type", TYPES[0]), options.get("llm_int8_threshold", 0.0)
    if kind not in TYPES:
        raise Refusal(f"quant.config.bnb_4bit_quant_type={kind} is unknown: choose one of {', '.join(TYPES)}")
    if not (type(threshold) in (int, float) and threshold >= 0):
        hint = "give 0 (no column is kept in 16 bits) or more"
        raise Refusal(f"quant.config.llm_int8_threshold={threshold} is no threshold: {hint}")
    if bits == 8:
        check_kernel(config["gpu"], (7, 5), "LLM.int8()")
    if config.get("adapter", {}).get("trains") == "all":
        hint = "use adapter=lora or quant=none"
        raise Refusal(f"quant={quant} adapter=full cannot train, since {quant} weights take no gradients: {hint}")


def load(config: Mapping[str, Any]) -> Any:
    """The quantized model; the output head and embeddings stay in the compute dtype.

    On the CPU, bitsandbytes repacks 4-bit weights for AVX-512 after any forward pass without gradients, and from then
    on their gradients are wrong without an error. A training run therefore switches the repacking off.
    """
    import torch
    from hydra.utils import instantiate

    # int8 on the CPU logs a line for each layer and call.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    options = dict(config["quant"]["config"])
    if options.get("load_in_4bit"):
        options["bnb_4bit_compute_dtype"] = getattr(torch, config["dtype"])
    if "llm_int8_threshold" in options:
        options["llm_int8_threshold"] = float(options["llm_int8_threshold"])  # which transformers insists on
    quantization = instantiate(options)
    if config["model"]["weights"] == "random":
        model = _random(config, quantization)
    else:
        model = load_weights(
            config["model"], config["dtype"], config["gpu"]["device"], quantization_config=quantization
        )
    if "adapter" in config:
        switch_off_repacking(model)
    return model


def _random(config: Mapping[str, Any], quantization: Any) -> Any:
    """Random weights, quantized layer by layer as transformers does with those it reads."""
    import bitsandbytes
    import torch
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    from llm_at_home.models import random_weights

    four_bit = quantization.load_in_4bit
    kind: Any = bitsandbytes.nn.Params4bit if four_bit else bitsandbytes.nn.Int8Params

    def replace(model: Any) -> None:
        replace_with_bnb_linear(model, ["lm_head"], quantization)

    def fill(layer: Any, weight: torch.Tensor) -> None:
        attributes = {key: value for key, value in layer.weight.__dict__.items() if key not in ("CB", "SCB")}
        device = weight.device
        # int8 quantizes what comes from the host, 4 bits also what is on the device.
        source = weight if four_bit else weight.cpu()
        layer.weight = kind(source, requires_grad=False, **attributes).to(device)

    layers = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    model = random_weights.build(
        load_config(config["model"]),
        getattr(torch, config["dtype"]),
        config["gpu"]["device"],
        random_weights.Quantized(replace, layers, fill),
    )
    # What PEFT looks at to put its layers for quantized bases in place.
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = four_bit, not four_bit
    model.config.quantization_config = quantization
    return model


def switch_off_repacking(model: Any) -> None:
    """Keep 4-bit layers on the kernel whose gradients are right (CPU)."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
