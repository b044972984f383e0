"""Random packed weights in GPTQ's and AWQ's formats: true in memory, speed and energy, and in nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_at_home.quantization.gptq_kernels import kernel_for
from llm_at_home.quantization.gptq_output import library_output
from llm_at_home.quantization.layers import linear_layers

SPREAD = 0.02  # standard deviation of the weights that the codes stand for, as transformers initialises them


def build(config: Mapping[str, Any]) -> Any:
    """A model of this architecture whose linear layers hold random codes, laid out as the kernel wants them."""
    with library_output():
        return _build(config)


def _build(config: Mapping[str, Any]) -> Any:
    import torch
    from gptqmodel import BACKEND
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear
    from gptqmodel.quantization.config import FORMAT, METHOD, AWQConfig, GPTQConfig
    from gptqmodel.utils.importer import get_kernel_for_backend
    from gptqmodel.utils.model import gptqmodel_post_init

    from llm_at_home.models import random_weights
    from llm_at_home.models.loading import load_config

    quant, device = config["quant"], config["gpu"]["device"]
    dtype = getattr(torch, config["dtype"])
    options = {"bits": quant["bits"], "group_size": quant["group_size"], "sym": quant["sym"], "offload_to_disk": False}
    settings = (
        AWQConfig(method=METHOD.AWQ, format=FORMAT.GEMM, **options)
        if quant["algorithm"] == "awq"
        else GPTQConfig(desc_act=quant["desc_act"], **options)
    )
    kernel = kernel_for(config, [quant["bits"]])

    kind = get_kernel_for_backend(BACKEND(kernel), settings.method, settings.format)
    layout = {} if quant["algorithm"] == "awq" else {"format": settings.format}

    def replace(model: Any) -> None:
        for name, module in list(linear_layers(model)):
            layer = kind(
                bits=quant["bits"],
                group_size=quant["group_size"],
                desc_act=bool(settings.desc_act),
                sym=quant["sym"],
                in_features=module.in_features,
                out_features=module.out_features,
                bias=module.bias is not None,
                pack_dtype=torch.int32,
                dtype=dtype,
                name=name,
                backend=BACKEND(kernel),
                register_buffers=True,
                **layout,
            )
            model.set_submodule(name, layer)

    def fill(layer: Any, weight: torch.Tensor) -> None:
        _fill(layer, dtype, weight.device)

    quantized = random_weights.Quantized(replace, (BaseQuantLinear,), fill)
    model = random_weights.build(load_config(config["model"]), dtype, device, quantized)
    model = gptqmodel_post_init(model, use_act_order=bool(settings.desc_act), quantize_config=settings)
    return model.requires_grad_(False).eval()


def _fill(layer: Any, dtype: Any, device: Any) -> None:
    """Random codes, and scales that give the weights their spread; all else as an ordinary checkpoint has it."""
    import torch

    levels = 2**layer.bits
    scale = SPREAD / (levels / 12**0.5)
    for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
        if name == "scales":
            value = torch.full(tensor.shape, scale, dtype=tensor.dtype, device=device)
        elif name == "g_idx":
            value = (torch.arange(tensor.shape[0], device=device) // layer.group_size).to(tensor.dtype)
        elif name == "qweight":
            value = torch.randint(-(2**31), 2**31, tensor.shape, dtype=torch.int64, device=device).to(tensor.dtype)
        elif name == "qzeros":
            words = torch.tensor(_middle(layer.bits), dtype=torch.int64, device=device)
            value = words[torch.arange(tensor.shape[1], device=device) % len(words)].expand(tensor.shape)
            value = value.to(tensor.dtype).contiguous()
        else:
            value = (
                tensor.to(device)
                if not tensor.is_meta
                else torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
            )
        if isinstance(tensor, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=False)
        setattr(layer, name, value)


def _middle(bits: int) -> list[int]:
    """The 32-bit words, in turn, in which every packed zero point is the middle code less one, as GPTQ's format has it.

    Codes of three bits run on from one word into the next.
    """
    code = 2 ** (bits - 1) - 1
    words = [sum((code >> ((32 * j + i) % bits) & 1) << i for i in range(32)) for j in range(bits)]
    return [word - 2**32 if word >= 2**31 else word for word in words]
