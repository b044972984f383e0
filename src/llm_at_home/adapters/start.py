"""An adapter that is meant to start as the identity must: checked at the start of every run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_at_home.records.schema import Reading

PROBE_TOKENS = 32
# Relative difference of logits that rounding explains, by dtype. DoRA and OFT compute the same function by another way.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 5e-2}


def probe_logits(model: Any, ids: list[int]) -> Any:
    """The logits of a few tokens, of shape (tokens, vocabulary), in float32 on the CPU.

    Args:
        model: in whatever mode; it is evaluated, and left as it was.
        ids: token ids, of which the first ``PROBE_TOKENS`` are looked at.
    """
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            device = model.get_input_embeddings().weight.device
            logits = model(input_ids=torch.tensor([ids[:PROBE_TOKENS]], device=device)).logits[0]
    finally:
        model.train(was_training)
    return logits.float().cpu()


def check_start(adapter: Mapping[str, Any], before: Any, after: Any, dtype: str) -> Reading:
    """That a fresh adapter left the model's function alone.

    Some methods run on some quantized bases and compute something else, without an error; every figure of such a run
    would be of another model.

    Args:
        adapter: the ``adapter`` group.
        before: logits of the base.
        after: of the same tokens with the adapter.
        dtype: the configuration's.

    Returns:
        The norm of the difference over that of the base's logits.

    Raises:
        RuntimeError: when the difference is more than rounding.
    """
    difference = float((after - before).norm() / before.norm())
    # Not a number fails the comparison, and so the check.
    if not difference <= TOLERANCE[dtype]:
        raise RuntimeError(
            f"adapter={adapter['name']} changes this base before it is trained (relative difference of the logits "
            f"{difference:.2g}): its layers do not fit this quantization; use adapter=lora or another quant="
        )
    return Reading(difference, "1", "relative_logit_difference", n=after.shape[0])
