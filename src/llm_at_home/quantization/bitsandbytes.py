"""bitsandbytes: LLM.int8() and the 4-bit types of QLoRA, quantized while the weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.models.loading import load_weights


def check(config: Mapping[str, Any]) -> None:
    """Refuse what cannot work.

    Raises:
        Refusal: for full fine-tuning, whose gradients integers cannot take, and for random weights.
    """
    quant = config["quant"]["name"]
    if config.get("adapter", {}).get("trains") == "all":
        hint = "use adapter=lora or quant=none"
        raise Refusal(f"quant={quant} adapter=full cannot train, since {quant} weights take no gradients: {hint}")
    if config["model"]["weights"] == "random":
        raise Refusal(f"quant={quant} quantizes weights as they are read, and random ones are not: use quant=none")


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
    model = load_weights(
        config["model"], config["dtype"], config["gpu"]["device"], quantization_config=instantiate(options)
    )
    if "adapter" in config:
        switch_off_repacking(model)
    return model


def switch_off_repacking(model: Any) -> None:
    """Keep 4-bit layers on the kernel whose gradients are right (CPU)."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
