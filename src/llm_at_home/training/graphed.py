"""The forward and backward pass of a micro-batch as one CUDA graph, so that the card never waits for Python."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llm_at_home.hardware.capture import captured

INPUTS = ("input_ids", "labels")


class GraphedPasses:
    """Runs a micro-batch's passes, those of a shape that was seen before as a graph.

    The first batch of a shape runs as it always does: kernels are compiled and chosen there. Graphs share one pool of
    memory, and leave it to a batch of a new shape, so that what is kept for the backward pass is there once.

    Args:
        passes: computes a batch's loss and adds its gradients to the parameters'; the loss, detached, is returned.
        trained: the parameters whose gradients are summed, which stay at one place from now on.
        record: captures what a function does; by default :class:`OnCard`.
    """

    def __init__(
        self,
        passes: Callable[[Mapping[str, Any]], torch.Tensor],
        trained: Sequence[torch.nn.Parameter],
        record: Any = None,
    ) -> None:
        self._passes, self._trained = passes, list(trained)
        self._record = record or OnCard()
        self._seen: set[tuple[int, ...]] = set()
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        self.not_captured: str | None = None

    def __call__(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """The loss of a batch of ``INPUTS``, each of shape (conversations, tokens); its gradients are added."""
        for parameter in self._trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        shape = tuple(batch["input_ids"].shape)
        if shape in self._seen and shape not in self._graphs and self.not_captured is None:
            self._capture(shape, batch)
        if self.not_captured is not None:
            return self._passes(batch)
        if shape in self._graphs:
            return self._graphs[shape].replayed(batch)
        self._seen.add(shape)
        self._let_go()
        return self._record.run(lambda: self._passes(batch))

    def clear_gradients(self) -> None:
        """Begin the next sum of gradients where the last one was."""
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        if gradients:
            torch._foreach_zero_(gradients)

    def close(self) -> None:
        """Let go of the graphs, the gradients and their memory; batches that come are captured anew."""
        self._let_go()
        for parameter in self._trained:
            parameter.grad = None

    def _let_go(self, force: bool = False) -> None:
        if self._graphs or force:
            self._graphs.clear()
            self._record.let_go()

    def counts(self) -> dict[str, int]:
        """``graphed_shapes``: how many shapes of batches were seen, each of which has its graph."""
        return {"graphed_shapes": 0 if self.not_captured else len(self._seen)}

    def notes(self) -> list[str]:
        """Why nothing was captured, where that is so."""
        return [f"no CUDA graph of the passes: {self.not_captured}"] if self.not_captured else []

    def _capture(self, shape: tuple[int, ...], batch: Mapping[str, Any]) -> None:
        inputs = {key: batch[key].clone() for key in INPUTS}
        try:
            replay, loss = self._record.capture(lambda: self._passes(inputs))
        except RuntimeError as error:  # a layer that waits for the device, say, or too little memory for a graph's pool
            self.not_captured = str(error).splitlines()[0]
            self._let_go(force=True)
            return
        self._graphs[shape] = _Graph(inputs, loss, replay)


@dataclass(frozen=True)
class _Graph:
    """A captured pair of passes, and where it reads and writes."""

    inputs: dict[str, torch.Tensor]
    loss: torch.Tensor
    replay: Callable[[], None]

    def replayed(self, batch: Mapping[str, Any]) -> torch.Tensor:
        for key, place in self.inputs.items():
            place.copy_(batch[key], non_blocking=True)
        self.replay()
        return self.loss.clone()


class OnCard:
    """Records on a CUDA device; everything runs on one stream of its own, as autograd wants what is captured."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool: Any = None

    def run(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run a function on the stream, and wait for it on the usual one."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            found = function()
        torch.cuda.current_stream().wait_stream(self._stream)
        return found

    def capture(self, function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """A function's work as a graph: what replays it, and the tensor that it returns each time anew."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, found = captured(function, self._stream, self._pool)
        return graph.replay, found

    def let_go(self) -> None:
        """Return the graphs' memory."""
        self._pool = None
        gc.collect()
        torch.cuda.empty_cache()
