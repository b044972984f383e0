"""Which of GPTQModel's kernels multiplies with a checkpoint's weights: chosen here, by name.

Its own automatic choice on a Hopper GPU is Machete, which downloads CUTLASS; elsewhere it may compile for minutes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.hardware.catalogue import capability as parsed


@dataclass(frozen=True)
class Kernel:
    """What one kernel of GPTQModel 7.6 can do.

    Args:
        algorithm: ``gptq``, ``awq`` or ``exl3``.
        device: ``cpu`` or ``cuda``; None is both.
        bits: that it takes.
        capability: the lowest compute capability.
        trains: whether gradients pass through it to the input.
        symmetric_only: whether it takes symmetric codes only.
        act_order: whether columns may be stored in another order.
        dtypes: of activations.
        group_sizes: inputs that share a scale.
    """

    algorithm: str
    device: str | None
    bits: tuple[int, ...]
    capability: tuple[int, int] = (0, 0)
    trains: bool = False
    symmetric_only: bool = False
    act_order: bool = True
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    group_sizes: tuple[int, ...] = (16, 32, 64, 128)


# In order of preference: the first that can do what is asked is chosen.
MARLIN_GROUPS = (32, 64, 128)
KERNELS = {
    "gptq_torch_aten": Kernel("gptq", "cpu", (4,)),
    "gptq_marlin": Kernel("gptq", "cuda", (4, 8), capability=(8, 0), symmetric_only=True, group_sizes=MARLIN_GROUPS),
    "gptq_triton": Kernel("gptq", "cuda", (2, 4, 8), capability=(7, 0)),
    "gptq_torch": Kernel("gptq", None, (2, 3, 4, 8), trains=True),
    "awq_torch_aten": Kernel("awq", "cpu", (4,)),
    "awq_marlin": Kernel("awq", "cuda", (4, 8), capability=(8, 0), group_sizes=MARLIN_GROUPS),
    "awq_gemm_triton": Kernel("awq", "cuda", (4,), capability=(7, 0), dtypes=("float16",), group_sizes=MARLIN_GROUPS),
    "awq_torch": Kernel("awq", None, (4, 8), trains=True),
    "exl3_exllama_v3": Kernel("exl3", "cuda", (), capability=(8, 0)),
}


@dataclass(frozen=True)
class Need:
    """What a checkpoint and a run ask of a kernel.

    Args:
        device: ``cpu`` or ``cuda``.
        bits: of all layers; one kernel serves them all.
        dtype: of activations.
        symmetric: whether codes are symmetric about zero.
        act_order: whether the columns were quantized in order of activation.
        group_size: inputs that share a scale; None where the format has none.
        trains: whether gradients must pass.
        capability: of the GPU, where it is known.
    """

    device: str
    bits: Sequence[int]
    dtype: str
    symmetric: bool = True
    act_order: bool = False
    group_size: int | None = None
    trains: bool = False
    capability: tuple[int, int] | None = None


def choose(algorithm: str, need: Need, named: str | None = None) -> str:
    """The name of the kernel for a checkpoint, or the one that the user named if it can do this.

    Args:
        algorithm: ``gptq``, ``awq`` or ``exl3``.
        need: what it must do.
        named: by the user.

    Raises:
        Refusal: when the named kernel cannot, or none can.
    """
    candidates = {name: kernel for name, kernel in KERNELS.items() if kernel.algorithm == algorithm}
    if named is not None and named not in candidates:
        raise Refusal(f"quant.kernel={named} is no kernel for {algorithm}: choose one of {', '.join(candidates)}")
    reasons = {}
    for name in [named] if named else candidates:
        lacks = _lacks(candidates[name], need)
        if lacks is None:
            return name
        reasons[name] = lacks
    if named is not None:
        raise Refusal(f"quant.kernel={named} {reasons[named]}: choose another, or leave quant.kernel out")
    raise Refusal("; ".join(f"{name} {why}" for name, why in reasons.items()))


def kernel_for(config: Mapping[str, Any], bits: Sequence[int]) -> str:
    """The kernel that a resolved configuration runs for a checkpoint of these bits.

    Raises:
        Refusal: when there is none, or the one named in ``quant.kernel`` cannot.
    """
    quant, gpu = config["quant"], config["gpu"]
    need = Need(
        device=gpu["device"],
        bits=bits,
        dtype=config["dtype"],
        symmetric=quant.get("sym", True),
        act_order=quant.get("desc_act", False),
        group_size=quant.get("group_size"),
        trains=config.get("adapter", {}).get("trains") == "adapter",
        capability=parsed(gpu["compute_capability"]) if "compute_capability" in gpu else None,
    )
    return choose(quant["algorithm"], need, quant["kernel"])


def _lacks(kernel: Kernel, need: Need) -> str | None:
    """Why a kernel cannot, in a few words, or None when it can."""
    if kernel.device not in (None, need.device):
        return f"needs gpu={kernel.device}"
    if kernel.bits and not set(need.bits) <= set(kernel.bits):
        other = sorted(set(need.bits) - set(kernel.bits))[0]
        return f"takes {' and '.join(map(str, kernel.bits))} bits and not {other}"
    if need.device == "cuda" and need.capability is not None and need.capability < kernel.capability:
        return f"needs compute capability {kernel.capability[0]}.{kernel.capability[1]}"
    if kernel.symmetric_only and not need.symmetric:
        return "takes symmetric codes only (quant.sym=true)"
    if need.act_order and not kernel.act_order:
        return "does not take act-order (quant.desc_act=false)"
    if need.dtype not in kernel.dtypes:
        return f"computes in {' or '.join(kernel.dtypes)} and not in {need.dtype}"
    if need.group_size is not None and need.group_size > 0 and need.group_size not in kernel.group_sizes:
        return f"takes groups of {', '.join(map(str, kernel.group_sizes))} and not {need.group_size}"
    if need.trains and not kernel.trains:
        return "passes no gradients"
    return None
