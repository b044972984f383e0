"""Keeping less for the backward pass: recomputed decoder layers, and logits made for a part of the tokens at a time.

Both trade computing for memory and change no figure: the same loss and gradients, but for the order of sums.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from llm_at_home.errors import Refusal
from llm_at_home.models.chat import IGNORED
from llm_at_home.models.logits import capped_logits


def checkpoint_layers(model: Any, every: str | int, offload: bool = False, captured: bool = False) -> int:
    """Recompute decoder layers in the backward pass instead of keeping what is inside them (Chen et al. 2016).

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter.
        every: ``none``, ``full``, or k: the first of each k layers is recomputed, the others keep theirs.
        offload: what is kept between recomputed layers waits in the host's memory.
        captured: for a CUDA graph. Random states, which the host holds, are not put back: nothing may draw numbers.

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
        options = {"use_reentrant": False, "preserve_rng_state": not captured}
        model.activation_checkpointing_enable(options, every_n_layers=step, offload=offload)
    except ValueError as error:
        raise Refusal(f"{error}: use memory.checkpointing=none") from error
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return sum(layer.gradient_checkpointing for layer in layers)


def logits(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """A model's logits for a training batch, of shape (conversations, tokens, vocabulary).

    Where neither a mask nor positions are given, transformers would ask the device whether the positions that it counts
    itself begin anew somewhere, and wait for the answer; while a CUDA graph is captured it would take it for yes.
    """
    from transformers import masking_utils

    if "attention_mask" in batch or "position_ids" in batch:
        return model(**model_inputs(batch)).logits
    asks = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        return model(**model_inputs(batch)).logits
    finally:
        masking_utils.find_packed_sequence_indices = asks


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a training batch the model takes.

    transformers tells packed conversations apart by their positions where neither a mask nor a cache is given. Rows
    without a mask have their padding on the right, where causal attention never looks.
    """
    if "position_ids" in batch:
        return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    if "attention_mask" not in batch:
        return {"input_ids": batch["input_ids"], "use_cache": False}
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


class ChunkedLoss:
    """The summed cross entropy without all logits at once, forth and back.

    Tokens that the loss does not look at get no logits at all, unless it is captured.

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter.
        tokens: whose logits are held together; None where Liger's fused kernel computes, which chooses by itself, so
            that they take no more than the hidden states (Hsu et al. 2024).
        captured: for a CUDA graph. All tokens get logits, since which ones the loss looks at the host would have to
            ask; nothing may draw numbers.

    Raises:
        Refusal: for an architecture that caps its logits after the output layer, or names that layer otherwise; for
            Liger, whose kernel reads the weights themselves, also where that layer is no plain one.
    """

    def __init__(self, model: Any, tokens: int | None, captured: bool = False) -> None:
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        capped = capped_logits(causal.config.get_text_config().to_dict())
        why = None
        if capped:
            why = f"caps its logits ({capped})"
        elif not hasattr(causal, "lm_head"):
            why = "has no output layer named lm_head"
        elif tokens is None and type(causal.lm_head) is not torch.nn.Linear:
            why = f"has an output layer of {type(causal.lm_head).__name__}, which Liger's kernel does not read"
        if why:
            raise Refusal(f"{type(causal).__name__} {why}: use memory.loss_tokens=null memory.loss=torch")
        self.model, self.causal, self.captured = model, causal, captured
        self._summed: Callable[..., torch.Tensor] = _liger
        if tokens:
            self._summed = functools.partial(_in_parts, tokens=tokens, preserve_rng_state=not captured)

    def __call__(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """The sum of next-token cross entropies in nats, in float32.

        Args:
            batch: as :meth:`llm_at_home.training.module.CausalLMModule.training_step` takes it.
        """
        labels = batch["labels"][:, 1:]
        with self._without_head() as head:
            hidden = logits(self.model, batch)
        # Prompt methods put tokens of their own before the conversation's.
        hidden = hidden[:, -batch["labels"].shape[1] : -1]
        if self.captured:
            return self._summed(head, hidden.flatten(0, 1), labels.flatten())
        looked_at = labels != IGNORED
        hidden, labels = hidden[looked_at], labels[looked_at]
        return self._summed(head, hidden, labels) if len(labels) else hidden.sum() * 0.0

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What this takes for the model's logits, of shape (conversations, tokens, vocabulary), for a check of it."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self._without_head() as head:
                return head(self.model(input_ids=input_ids).logits)
        finally:
            self.model.train(was_training)

    @contextlib.contextmanager
    def _without_head(self) -> Iterator[torch.nn.Module]:
        head = self.causal.lm_head
        self.causal.lm_head = torch.nn.Identity()
        try:
            yield head
        finally:
            self.causal.lm_head = head


def _in_parts(
    head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor, tokens: int, preserve_rng_state: bool
) -> torch.Tensor:
    sums = [
        checkpoint(_cross_entropy, head, *part, use_reentrant=False, preserve_rng_state=preserve_rng_state)
        for part in zip(hidden.split(tokens), labels.split(tokens), strict=True)
    ]
    return torch.stack(sums).sum()


def _cross_entropy(head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(head(hidden).float(), labels, ignore_index=IGNORED, reduction="sum")


def _liger(head: torch.nn.Linear, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    # In float32 where the output layer trains: its gradient is a sum over parts.
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    return loss(head.weight, hidden.to(head.weight.dtype), labels, head.bias)
