"""Perplexity of reference answers, given their questions: how well a model still knows what it was not tuned on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llm_at_home.evaluation.statistics import bootstrap_interval95
from llm_at_home.models.chat import IGNORED, encode
from llm_at_home.records.schema import Reading


def conversation_perplexity(
    model: Any, tokenizer: Any, conversations: Sequence[list[dict[str, str]]], max_length: int = 2048
) -> Reading:
    """exp of the mean negative log-likelihood (nats) of the assistant's tokens, over all conversations.

    The interval resamples conversations. Each is scored by itself, so that padding cannot touch the figure.
    """
    losses, tokens = [], []
    for messages in conversations:
        encoded = encode(tokenizer, messages, max_length)
        ids = torch.tensor([encoded.input_ids], device=model.device)
        labels = torch.tensor([encoded.labels], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids).logits
        # A trained prompt (prompt tuning, P-tuning) has logits of its own, before those of the tokens.
        logits = logits[:, -ids.shape[1] : -1].flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
        if encoded.trained_tokens:
            losses.append(float(loss))
            tokens.append(encoded.trained_tokens)
    if not tokens:
        return Reading.unknown("1", "no conversation has an assistant's answer")
    if not np.isfinite(losses).all():
        return Reading.unknown("1", "the model's logits are not finite")
    loss_array, token_array = np.asarray(losses), np.asarray(tokens)
    interval = bootstrap_interval95(
        len(losses), lambda chosen: math.exp(loss_array[chosen].sum() / token_array[chosen].sum())
    )
    value = math.exp(loss_array.sum() / token_array.sum())
    return Reading(value, "1", "assistant_tokens", interval95=interval, n=len(losses))
