"""Turns ``gpu=`` and ``dtype=auto`` into a device and a dtype before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.hardware.present import Gpu, present_gpus, torch_can_use_gpu

DTYPES = ("float32", "float16", "bfloat16")


def resolve_device(gpu: Mapping[str, Any]) -> dict[str, Any]:
    """Fill the ``gpu`` group: ``device`` becomes ``cpu`` or ``cuda``, and ``card`` the GPU's name or None.

    Raises:
        Refusal: when CUDA is asked for and there is none.
    """
    card = present_gpus()[0] if present_gpus() else None
    wanted = gpu["device"]
    if wanted == "cpu":
        return {**gpu, "card": None}
    usable = card is not None and torch_can_use_gpu()
    if wanted == "auto":
        return {**gpu, "device": "cuda" if usable else "cpu", "card": card.name if usable and card else None}
    if not usable:
        why = "the installed torch is a CPU build" if card else "no NVIDIA driver or GPU is visible"
        raise Refusal(f"gpu={gpu['name']} needs a CUDA GPU, but {why}: use gpu=auto or gpu=cpu")
    return {**gpu, "card": card.name if card else None}


def resolve_dtype(dtype: str, device: str, card: Gpu | None = None) -> str:
    """The dtype of weights and computation; ``auto`` is float32 on the CPU, bfloat16 on a GPU with it, else float16.

    Raises:
        Refusal: for an unknown dtype, or bfloat16 on a GPU of compute capability below 8.0.
    """
    if dtype not in (*DTYPES, "auto"):
        raise Refusal(f"dtype={dtype} is unknown: choose one of auto, {', '.join(DTYPES)}")
    if device == "cpu":
        return "float32" if dtype == "auto" else dtype
    card = card or (present_gpus()[0] if present_gpus() else None)
    has_bfloat16 = card is None or card.compute_capability >= (8, 0)
    if dtype == "auto":
        return "bfloat16" if has_bfloat16 else "float16"
    if dtype == "bfloat16" and not has_bfloat16 and card:
        raise Refusal(f"{card.name} has no bfloat16: use dtype=float16")
    return dtype
