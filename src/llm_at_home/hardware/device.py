"""Turns ``gpu=`` and ``dtype=auto`` into a device and a dtype before anything is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llm_at_home.errors import Refusal
from llm_at_home.hardware.catalogue import BFLOAT16, Card, capability, is_card
from llm_at_home.hardware.present import Gpu, present_gpus, torch_can_use_gpu

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")
# CUDA offers a few per cent less than the driver counts; below this share the memory is meant to be another card's.
SAME_MEMORY = 0.9


def resolve_device(gpu: Mapping[str, Any]) -> dict[str, Any]:
    """Fill the ``gpu`` group: which device computes, and which card it stands in for.

    Returns:
        For auto, cpu and cuda the group with ``device`` (``cpu`` or ``cuda``), ``card`` (the present card's name or
        None), ``emulated`` (False) and, on a GPU, ``compute_capability``. For a card of the catalogue the same, with
        its ``name``, ``memory`` (GB), ``compute_capability`` and ``power_limit`` (W); its prices and speeds are the
        planner's and would only change the config hash. Such a card on the CPU is plain ``cpu``.

    Raises:
        Refusal: when CUDA is asked for and there is none, or the chosen card is larger than the one present.
    """
    if gpu["device"] == "cpu":
        return _on_cpu(gpu)
    present = present_gpus()[0] if present_gpus() else None
    if present is None or not torch_can_use_gpu():
        if gpu["device"] == "auto":
            return _on_cpu(gpu)
        why = "the installed torch is a CPU build" if present else "no NVIDIA driver or GPU is visible"
        raise Refusal(f"gpu={gpu['name']} needs a CUDA GPU, but {why}: use gpu=auto or gpu=cpu")
    if is_card(gpu):
        return _as_card(Card.from_config(gpu), present)
    found = {"device": "cuda", "card": present.name, "emulated": False}
    return {**gpu, **found, "compute_capability": ".".join(map(str, present.compute_capability))}


def _on_cpu(gpu: Mapping[str, Any]) -> dict[str, Any]:
    kept = {"name": "cpu"} if is_card(gpu) else gpu
    return {**kept, "device": "cpu", "card": None, "emulated": False}


def _as_card(card: Card, present: Gpu) -> dict[str, Any]:
    if present.memory is None:
        raise Refusal(f"gpu={card.name}: the driver does not say how large the {present.name} is: use gpu=auto")
    if present.memory < card.memory:
        raise Refusal(
            f"gpu={card.name} ({card.memory:.1f} GB) is larger than the {present.name} present "
            f"({present.memory:.1f} GB): choose a smaller card or gpu=auto; the planner may use any card"
        )
    same = _model(card.title) == _model(present.name) and card.memory > SAME_MEMORY * present.memory
    return {
        "name": card.name,
        "device": "cuda",
        "card": present.name,
        "emulated": not same,
        "memory": card.memory,
        "compute_capability": card.capability_text,
        "power_limit": card.power_limit,
    }


def _model(title: str) -> str:
    """Drivers differ in the maker's and the brand's name before it."""
    return " ".join(word for word in title.split() if word not in ("NVIDIA", "Tesla"))


def resolve_dtype(dtype: str, gpu: Mapping[str, Any] | str) -> str:
    """The dtype of weights and computation; ``auto`` is float32 on the CPU, bfloat16 on a GPU with it, else float16.

    Args:
        dtype: ``auto``, ``float32``, ``float16`` or ``bfloat16``.
        gpu: the group as :func:`resolve_device` returns it, or a device alone (``cpu``, ``cuda``).

    Raises:
        Refusal: for an unknown dtype, or bfloat16 on a card of compute capability below 8.0.
    """
    if dtype not in (*DTYPES, "auto"):
        raise Refusal(f"dtype={dtype} is unknown: choose one of auto, {', '.join(DTYPES)}")
    group = {"device": gpu} if isinstance(gpu, str) else gpu
    if group["device"] == "cpu":
        return "float32" if dtype == "auto" else dtype
    lacking = _lacking(group, BFLOAT16)
    if dtype == "auto":
        return "float16" if lacking else "bfloat16"
    if dtype == "bfloat16" and lacking:
        raise Refusal(f"{lacking} has no bfloat16: use dtype=float16")
    return dtype


def check_kernel(
    gpu: Mapping[str, Any], needs: tuple[int, int], what: str, instead: str = "choose another quant or gpu"
) -> None:
    """Refuse a kernel that the chosen card, or the one that stands in for it, does not have. The CPU is not checked.

    Args:
        gpu: the group as :func:`resolve_device` returns it.
        needs: the lowest compute capability that has the kernel.
        what: the kernel or method, for the message.
        instead: what to change, for the message.

    Raises:
        Refusal: naming the card and what is needed.
    """
    if gpu["device"] == "cpu":
        return
    lacking = _lacking(gpu, needs)
    if lacking:
        raise Refusal(f"{lacking} cannot run {what}, which needs {needs[0]}.{needs[1]}: {instead}")


def runs_triton(device: torch.device) -> bool:
    """Whether this project's Triton kernels are taken there: from compute capability 8.0 on, where Triton is."""
    import torch

    ready = device.type == "cuda" and torch.cuda.get_device_capability(device) >= BFLOAT16
    return ready and importlib.util.find_spec("triton") is not None


def _lacking(gpu: Mapping[str, Any], needs: tuple[int, int]) -> str:
    """The chip below this compute capability, in words, or nothing.

    An emulated card can be of a later generation than the one that computes: then both must have it.
    """
    chips = []
    if "compute_capability" in gpu:
        label = f"gpu={gpu['name']}" if "memory" in gpu else str(gpu["card"])
        chips.append((label, capability(gpu["compute_capability"])))
    if present_gpus() and (gpu.get("emulated") or not chips):
        chips.append((present_gpus()[0].name, present_gpus()[0].compute_capability))
    found = [(label, chip) for label, chip in chips if chip < needs]
    return f"{found[0][0]} (compute capability {found[0][1][0]}.{found[0][1][1]})" if found else ""
