"""Trained normalisations in float32: a step of 1e-3 is lost on a scale near 1 in bfloat16, and so is the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def widen(model: Any, saved: Path | None = None) -> None:
    """Keep the copies of normalisations that train in float32, as PEFT keeps what other adapters add.

    What they give stays in the dtype of what they get, so that the layers behind notice nothing. Those of
    ``torch.nn.LayerNorm`` stay as they are: its kernel wants weights of its input's dtype.

    Args:
        model: a ``PeftModel`` to be trained; without LN tuning it is left alone.
        saved: the folder that it was loaded from, which the base's dtype has rounded; it is read again.
    """
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    layers = [module for module in model.modules() if isinstance(module, LNTuningLayer)]
    for layer in layers:
        for copy in layer.ln_tuning_layers.values():
            if not isinstance(copy, torch.nn.LayerNorm):
                copy.float()
                copy.register_forward_hook(_in_the_input_s_dtype)
    if layers and saved is not None:
        set_peft_model_state_dict(model, load_peft_weights(str(saved), device="cpu"))


def _in_the_input_s_dtype(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
    return output.to(inputs[0].dtype)
