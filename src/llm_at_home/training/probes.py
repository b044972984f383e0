"""What packing, logits in parts and graphs rely on, tried on the model before it trains: no list is whole."""

from __future__ import annotations

from typing import Any

import torch

from llm_at_home.adapters.start import TOLERANCE, probe_logits
from llm_at_home.errors import Refusal
from llm_at_home.training.activations import ChunkedLoss, logits

PROBE_TOKENS = 16


def check_packing(model: Any, ids: list[int], dtype: str) -> None:
    """See that conversations in one row do not see each other, and are what they would be alone.

    transformers tells them apart by their positions. An architecture with a recurrence, with ALiBi, or with positions
    of its own counting does not, and would train on another task without an error.

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter.
        ids: some token ids of the data.
        dtype: the configuration's; says what rounding may do.

    Raises:
        Refusal: where they do.
    """
    second = ids[:PROBE_TOKENS]
    first = second[::-1]
    packed, same_packed = _last(model, _packed(first, second)), _last(model, _packed(second, second))
    rows, same_rows = _last(model, _rows(first, second)), _last(model, _rows(second, second))
    # With as many tokens before it, another conversation there must change no more than in a row of its own: nothing,
    # but for LLM.int8(), which keeps columns in 16 bits where any token of a batch has an outlier.
    seen, usual = (float((a - b).norm() / a.norm()) for a, b in ((packed, same_packed), (rows, same_rows)))
    changed = float((packed - rows).norm() / rows.norm())
    if not (seen <= 2 * usual + TOLERANCE[dtype] / 10 and changed <= TOLERANCE[dtype]):
        raise Refusal(
            f"{_name(model)} does not keep packed conversations apart (relative difference of the logits "
            f"{max(seen, changed):.2g}): use data.packing=false"
        )


def _packed(first: list[int], second: list[int]) -> dict[str, list[list[int]]]:
    positions = [*range(len(first)), *range(len(second))]
    return {"input_ids": [[*first, *second]], "position_ids": [positions]}


def _rows(first: list[int], second: list[int]) -> dict[str, list[list[int]]]:
    return {"input_ids": [first, second], "attention_mask": [[1] * len(first)] * 2}


def _last(model: Any, batch: dict[str, list[list[int]]]) -> torch.Tensor:
    """The logits of the second of two conversations of one length, of shape (tokens, vocabulary)."""
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            tensors = {key: torch.tensor(values, device=device) for key, values in batch.items()}
            found = logits(model, tensors)
    finally:
        model.train(was_training)
    return found.flatten(0, 1)[found.shape[:2].numel() // 2 :].float().cpu()


def check_unmasked(model: Any, ids: list[int], dtype: str) -> None:
    """See that padding on the right, without a mask, changes nothing before it.

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter.
        ids: some token ids of the data.
        dtype: the configuration's; says what rounding may do.

    Raises:
        Refusal: where it does.
    """
    first = ids[:PROBE_TOKENS]
    wanted = probe_logits(model, first)
    found = probe_logits(model, [*first, *first[::-1]])[: len(wanted)]
    difference = float((found - wanted).norm() / wanted.norm())
    if not difference <= TOLERANCE[dtype]:
        raise Refusal(
            f"{_name(model)} looks at what comes after a token (relative difference of the logits "
            f"{difference:.2g}): use trainer.padded_lengths=null"
        )


def check_head(model: Any, loss: ChunkedLoss, ids: list[int], dtype: str) -> None:
    """See that the logits are the output layer's and nothing else: what comes after it would be left out.

    Args:
        model: the loss's model.
        loss: as the run will use it.
        ids: some token ids of the data.
        dtype: the configuration's; says what rounding may do.

    Raises:
        Refusal: where something comes after it.
    """
    wanted = probe_logits(model, ids[:PROBE_TOKENS])
    found = loss.logits(torch.tensor([ids[:PROBE_TOKENS]], device=model.get_input_embeddings().weight.device))
    difference = float((found[0, -len(wanted) :].float().cpu() - wanted).norm() / wanted.norm())
    if not difference <= TOLERANCE[dtype]:
        raise Refusal(
            f"{_name(model)} does something to its logits after the output layer (relative difference "
            f"{difference:.2g}): use memory.loss_tokens=null memory.loss=torch"
        )


def draws_numbers(model: Any, ids: list[int]) -> bool:
    """Whether the model draws random numbers while it trains, for dropout or noise, from the device or the host.

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter.
        ids: some token ids of the data.
    """
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        before = _random_states(device)
        model.train()
        try:
            with torch.no_grad():
                logits(model, {"input_ids": torch.tensor([ids[:PROBE_TOKENS]], device=device)})
        finally:
            model.train(was_training)
        return any(not torch.equal(a, b) for a, b in zip(before, _random_states(device), strict=True))


def _random_states(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _name(model: Any) -> str:
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
