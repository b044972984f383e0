"""Keeping less for the backward pass: recomputed decoder layers, and logits made for a part of the tokens at a time.

Both trade computing for memory and change no figure: the same loss and gradients, but for the order of sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from llm_at_home.errors import Refusal
from llm_at_home.models.chat import IGNORED

# What some architectures do to logits after the output layer, by the key in their config; None or 1 is nothing.
AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def checkpoint_layers(model: Any, every: str | int, offload: bool = False) -> int:
    """Recompute decoder layers in the backward pass instead of keeping what is inside them (Chen et al. 2016).

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter.
        every: ``none``, ``full``, or k: the first of each k layers is recomputed, the others keep theirs.
        offload: what is kept between recomputed layers waits in the host's memory.

    Returns:
        How many layers are recomputed.

    Raises:
        Refusal: when the architecture has no layers that can be.
    """
    if every == "none":
        return 0
    from transformers.modeling_layers import GradientCheckpointingLayer

    step = 1 if every == "full" else int(every)
    try:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=step, offload=offload)
    except ValueError as error:
        raise Refusal(f"{error}: use memory.checkpointing=none") from error
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return sum(layer.gradient_checkpointing for layer in layers)


def model_inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What of a training batch the model takes.

    transformers tells packed conversations apart by their positions where neither a mask nor a cache is given.
    """
    if "position_ids" in batch:
        return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


class ChunkedLoss:
    """The summed cross entropy with the logits of at most so many tokens at once, forth and back.

    Tokens that the loss does not look at get no logits at all.

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter.
        tokens: whose logits are held together.

    Raises:
        Refusal: for an architecture that changes its logits after the output layer, or names that layer otherwise.
    """

    def __init__(self, model: Any, tokens: int) -> None:
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = causal.config.get_text_config()
        changed = [key for key in AFTER_THE_HEAD if getattr(config, key, None) not in (None, 1, 1.0)]
        if changed or not hasattr(causal, "lm_head"):
            why = f"changes its logits ({changed[0]})" if changed else "has no output layer named lm_head"
            raise Refusal(f"{type(causal).__name__} {why}: use memory.loss_tokens=null")
        self.model, self.causal, self.tokens = model, causal, tokens

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The sum of next-token cross entropies in nats, in float32.

        Args:
            batch: as :meth:`llm_at_home.training.module.CausalLMModule.training_step` takes it.
        """
        labels = batch["labels"][:, 1:]
        with self._without_head() as head:
            hidden = self.model(**model_inputs(batch)).logits
        # Prompt methods put tokens of their own before the conversation's.
        hidden = hidden[:, -batch["labels"].shape[1] : -1]
        looked_at = labels != IGNORED
        hidden, labels = hidden[looked_at], labels[looked_at]
        parts = zip(hidden.split(self.tokens), labels.split(self.tokens), strict=True)
        losses = [checkpoint(_summed, head, *part, use_reentrant=False) for part in parts]
        return torch.stack(losses).sum() if losses else hidden.sum() * 0.0

    @contextlib.contextmanager
    def _without_head(self) -> Iterator[torch.nn.Module]:
        head = self.causal.lm_head
        self.causal.lm_head = torch.nn.Identity()
        try:
            yield head
        finally:
            self.causal.lm_head = head


def _summed(head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(head(hidden).float(), labels, reduction="sum")
