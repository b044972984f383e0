"""The Lightning module: a causal language model whose loss is averaged over the tokens of the effective batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule

from llm_at_home.models.chat import IGNORED
from llm_at_home.training.activations import ChunkedLoss, logits
from llm_at_home.training.counting import targets_in, tokens_in
from llm_at_home.training.graphed import GraphedPasses

# Sums of token losses are divided by this before the backward pass, so that fp16 gradients keep their usual size; it
# cancels out before the optimizer sees them.
REFERENCE_TOKENS = 256.0


class CausalLMModule(LightningModule):
    """Fine-tunes what is trainable in ``model`` on batches of token ids.

    Gradients of an accumulation window are summed over its tokens and divided once by their number, so that the split
    of an effective batch into micro-batches does not change the update, whatever the lengths (a mean of means would).

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter.
        optimizer: makes the optimizer from the trainable parameters.
        scheduler: makes the learning-rate schedule from the optimizer; it counts optimizer steps.
        chunked_loss: computes the loss without all logits at once; None for all of them.
        token_loss: from logits and labels to the summed loss; by default :func:`token_loss_sum` as it is.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Callable[..., torch.optim.Optimizer],
        scheduler: Callable[..., Any] | None = None,
        chunked_loss: ChunkedLoss | None = None,
        token_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self._chunked_loss = chunked_loss
        self._token_loss = token_loss or token_loss_sum
        self._graphed: GraphedPasses | None = None
        self._scaler: torch.amp.GradScaler | None = None  # of 16-mixed
        self.strict_loading = False  # checkpoints hold the trainable parameters alone
        self.history: list[dict[str, float]] = []
        # What an adapter method adds to the loop: the gradient of a term of the objective, once an optimizer step, and
        # what it does after the step while gradients are there, given the step's number.
        self.penalty: Callable[[], object] | None = None
        self.after_optimizer_step: Callable[[int], None] | None = None
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        self._gradient_norm: torch.Tensor | None = None
        self._learning_rate = math.nan  # of the step being made: after it the schedule has moved on
        self._start_window()

    def _start_window(self) -> None:
        self._loss_sum: Any = 0.0
        self._tokens = 0
        self._input_tokens = 0

    def graph_passes(self, record: Any = None) -> GraphedPasses:
        """Run forward and backward passes as graphs from now on; ``record`` is :class:`GraphedPasses`' own."""
        self._graphed = GraphedPasses(self._both_passes, self._trainable, record)
        return self._graphed

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule; None where nothing trains."""
        if not self._trainable:
            return None
        optimizer = self.make_optimizer(self._trainable)
        if self.make_scheduler is None:
            return optimizer
        schedule = {"scheduler": self.make_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> torch.Tensor:
        """One micro-batch.

        Args:
            batch: ``input_ids``, ``labels``, and ``attention_mask`` or (of packed conversations) ``position_ids``, each
                of shape (conversations, tokens); ``lengths`` and ``targets`` where they were counted.
            batch_idx: its number in the epoch.

        Returns:
            The sum of the token losses over ``REFERENCE_TOKENS``, a scalar. With graphs its gradients were added.
        """
        # Before the forward pass: a GPU that is asked for a number afterwards has to finish first.
        self._tokens += targets_in(batch)
        self._input_tokens += tokens_in(batch)
        if self._graphed is not None:
            loss = self._graphed(batch)
        else:
            with torch.set_grad_enabled(bool(self._trainable)):
                loss = self._loss(batch)
        self._loss_sum = self._loss_sum + loss.detach()
        scaled = loss / REFERENCE_TOKENS
        if self._graphed is not None or not self._trainable:
            return scaled.detach().requires_grad_()  # nothing is left for Lightning's backward pass
        return scaled

    def _loss(self, batch: Mapping[str, Any]) -> torch.Tensor:
        if self._chunked_loss:
            return self._chunked_loss(batch)
        found = logits(self.model, batch)
        more = found.shape[1] - batch["labels"].shape[1]
        # Prompt methods put tokens of their own before the conversation's. A slice of all would cost its copy.
        return self._token_loss(found[:, more:] if more else found, batch["labels"])

    def _both_passes(self, batch: Mapping[str, Any]) -> torch.Tensor:
        device = self.device.type
        dtype, mixed = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        # Weights that autocast keeps between operations would be a graph's own.
        with torch.autocast(device, dtype, enabled=mixed, cache_enabled=False):
            loss = self._loss(batch)
        with torch.autocast(device, enabled=False):
            scaled = loss / REFERENCE_TOKENS
            # The factor is a tensor that stays at its place: a graph reads what it is by then.
            (self._scaler.scale(scaled) if self._scaler else scaled).backward()
        return loss.detach()

    def on_fit_start(self) -> None:
        """Know the strategy's scaler, whose factor the passes of a graph bring in themselves."""
        self._scaler = getattr(self.trainer.precision_plugin, "scaler", None)

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's own, without its division by ``accumulate_grad_batches``, which is no number of micro-batches."""
        super().backward(loss * self.trainer.accumulate_grad_batches, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn the window's summed gradients into the gradient of its mean token loss (after fp16 is unscaled).

        Of several processes each has its own micro-batches, and Lightning's strategy has averaged their gradients.
        A penalty adds its gradient here: it does not depend on the tokens.
        """
        self._sum_over_processes()
        if self._trainable:
            self._learning_rate = float(optimizer.param_groups[0]["lr"])
        gradients = [p.grad for p in self._trainable if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, self.trainer.world_size * REFERENCE_TOKENS / self._tokens)
        if self.penalty is not None:
            self.penalty()

    def _sum_over_processes(self) -> None:
        if self.trainer.world_size > 1:
            own = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=self.device) for x in self._window()])
            summed = self.trainer.strategy.reduce(own, reduce_op="sum")
            self._loss_sum, self._tokens, self._input_tokens = summed[0], int(summed[1]), int(summed[2])

    def _window(self) -> tuple[Any, int, int]:
        return self._loss_sum, self._tokens, self._input_tokens

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's own, then what the adapter method does after each step; the next window begins without gradients.

        Lightning would drop them at multiples of ``accumulate_grad_batches`` in a pass, where a schedule's windows need
        not begin.
        """
        super().optimizer_step(*args, **kwargs)
        if self.after_optimizer_step is not None:
            self.after_optimizer_step(self.trainer.global_step + 1)  # the step is counted when this returns
        if self._graphed is not None:
            self._graphed.clear_gradients()
        else:
            for parameter in self._trainable:
                parameter.grad = None

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Nothing: :meth:`optimizer_step` drops them, and a graph's are there before Lightning asks for this."""

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the accumulated gradient's 2-norm, and keep the norm from before clipping."""
        if gradient_clip_val and self._trainable:
            # Its value is asked for when the step is over: until then the device need not be waited for.
            self._gradient_norm = torch.nn.utils.clip_grad_norm_(self._trainable, float(gradient_clip_val))

    def close_window(self) -> dict[str, float]:
        """Figures of the optimizer step just made: ``loss`` (nats/token), ``tokens``, ``gradient_norm``, ``lr``.

        Called once a step, by the step log; the next window starts here.
        """
        step = {
            "step": float(self.trainer.global_step),
            "loss": float(self._loss_sum) / self._tokens,
            "tokens": float(self._tokens),
            "input_tokens": float(self._input_tokens),
        }
        if self._gradient_norm is not None:
            step["gradient_norm"] = float(self._gradient_norm)
        if self._trainable:
            step["lr"] = self._learning_rate
        self.history.append(step)
        self._start_window()
        return step

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trainable parameters alone: the base is not the checkpoint's to keep."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the history of steps, so that a resumed run still knows its first loss."""
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the history of steps."""
        self.history = list(checkpoint["history"])


def token_loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum of next-token cross entropies in nats, in float32.

    Args:
        logits: of shape (conversations, tokens, vocabulary).
        labels: of shape (conversations, tokens), -100 where the loss does not look.
    """
    # Labels are moved, since the logits are large: the last token of a conversation predicts nothing.
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), following.flatten(), ignore_index=IGNORED, reduction="sum"
    )
