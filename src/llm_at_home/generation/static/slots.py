"""Sequences that are decoded together, a token each a step: their cache, and the step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from llm_at_home.generation.reply import Sampling
from llm_at_home.generation.static.layers import Decoder

PROMPT_PART = 4096  # tokens of a prompt that are read at once, which bounds the memory of its activations


class Slots:
    """Places for sequences, each filled by :meth:`admit`; :meth:`launch` decodes one token of every one.

    Args:
        model: a causal language model of the Llama family, on its device.
        count: of places.
        capacity: tokens of a prompt and its answer, and one more.
        operations: the module ``kernels`` or ``reference``.
        capture: whether a step is captured as a CUDA graph.
        end_ids: tokens that end an answer.

    Raises:
        Unsupported: for a model that cannot be decoded so.
    """

    def __init__(
        self, model: Any, count: int, capacity: int, operations: Any, capture: bool, end_ids: Sequence[int]
    ) -> None:
        self.count, self.capacity, self.capture = count, capacity, capture
        self.decoder = Decoder(model, operations, capacity)
        weight = self.decoder.decoder.embed_tokens.weight
        self.device = weight.device
        config = self.decoder.decoder.config
        shape = (count, config.num_key_value_heads, capacity, self.decoder.head_dim)
        self.keys = [torch.zeros(shape, dtype=weight.dtype, device=self.device) for _ in self.decoder.blocks]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.end_ids = list(end_ids)
        self.places = torch.arange(count, device=self.device)
        self.reused = 0  # tokens of the last prompt that were not read again
        self._read: list[list[int]] = [[] for _ in range(count)]  # whose keys and values each place holds

        def state(size: Any, dtype: torch.dtype, value: float = 0) -> torch.Tensor:
            return torch.full(size, value, dtype=dtype, device=self.device)

        self.tokens, self.positions, self.active = (state((count,), torch.int64) for _ in range(3))
        self.temperatures = state((count, 1), torch.float32)
        self.forbidden = state((count, config.vocab_size), torch.float32)
        self.noise: torch.Tensor | None = None  # only sampled answers need it
        self.generators: dict[int, torch.Generator] = {}
        self.not_captured: str | None = None  # why there is no graph after all
        self._graphs: dict[bool, Any] = {}
        self._pool: Any = None
        pinned = self.device.type == "cuda"
        self._arrived = [torch.empty((count,), dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._turn = 0

    @torch.inference_mode()
    def admit(self, slot: int, prompt: Sequence[int], sampling: Sampling) -> int:
        """Read a prompt into a place and return its first new token.

        What the place has read of it already, in an earlier turn, is not read again.

        Args:
            slot: the place, whose earlier sequence is forgotten.
            prompt: token ids.
            sampling: how this sequence's tokens are chosen; its seed is its own, whatever is decoded beside it.

        Raises:
            ValueError: when prompt and answer are longer than the place.
        """
        if len(prompt) + sampling.max_new_tokens >= self.capacity:
            raise ValueError(f"{len(prompt)} + {sampling.max_new_tokens} tokens do not fit into {self.capacity}")
        known = self.reused = _shared_length(self._read[slot], prompt)
        self._read[slot] = self._read[slot][:known]
        ids = torch.tensor(list(prompt[known:]), device=self.device)
        for start in range(0, len(ids), PROMPT_PART):
            some = ids[start : start + PROMPT_PART]
            logits = self.decoder.prompt(some, known + start, slot, self.keys, self.values)
        self._read[slot] = list(prompt)
        self.positions[slot] = len(prompt)
        self.active[slot] = 1
        self.temperatures[slot] = sampling.temperature
        self.forbidden[slot] = 0
        if sampling.ignore_eos and self.end_ids:
            self.forbidden[slot, self.end_ids] = float("-inf")
        self.generators.pop(slot, None)
        if sampling.temperature > 0:
            self.generators[slot] = torch.Generator(self.device).manual_seed(sampling.seed)
            if self.noise is None:
                self.noise = torch.full_like(self.forbidden, 0.5)
        self._draw([slot])
        part = slice(slot, slot + 1)
        self.tokens[part] = self._choose(logits.float(), part, sampling.temperature > 0)
        return int(self.tokens[slot])

    def release(self, slot: int, answer: Sequence[int] = ()) -> None:
        """Empty a place; what it has read is kept for a prompt that begins in the same way.

        Args:
            slot: the place.
            answer: the tokens that were decoded there.
        """
        self._read[slot] += answer[:-1]  # the last one was never read
        self.active[slot] = 0  # its position stays behind what is kept, since every step writes there
        self.temperatures[slot] = 0
        self.generators.pop(slot, None)

    def closest(self, prompt: Sequence[int], free: Sequence[int]) -> int:
        """Which of the free places has read most of a prompt already; else the one that has least to lose."""
        return max(free, key=lambda slot: (_shared_length(self._read[slot], prompt), -len(self._read[slot])))

    def forget(self) -> None:
        """Read every prompt anew from now on."""
        self._read = [[] for _ in range(self.count)]

    @torch.inference_mode()
    def launch(self) -> Arrival:
        """Start the step that decodes the next token of every place, and return where they will arrive."""
        sampled = bool(self.generators)
        if self.capture and sampled not in self._graphs:
            try:
                self._graphs[sampled] = self._captured(sampled)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # a layer that waits for the device, say
                self.capture, self.not_captured = False, str(error).splitlines()[0]
        self._draw(self.generators)
        if self.capture:
            self._graphs[sampled].replay()
        else:
            self._advance(sampled)
        self._turn = 1 - self._turn
        return Arrival(self.tokens, self._arrived[self._turn])

    def _advance(self, sampled: bool) -> None:
        last = self.positions * self.active  # empty places look at one token only
        logits = self.decoder.next_token(self.tokens, self.positions, last, self.places, self.keys, self.values).float()
        self.tokens.copy_(self._choose(logits, slice(None), sampled))
        self.positions.add_(self.active)

    def _choose(self, logits: torch.Tensor, part: slice, sampled: bool) -> torch.Tensor:
        """The likeliest tokens, or by temperature: the largest of logits with Gumbel noise is a sample."""
        scores = logits + self.forbidden[part]
        if sampled and self.noise is not None:
            warm = self.temperatures[part]
            drawn = scores / warm.clamp(min=1e-6) - (-self.noise[part].log()).log()
            scores = torch.where(warm > 0, drawn, scores)
        return scores.argmax(-1)

    def _draw(self, slots: Iterable[int]) -> None:
        for slot in slots:
            if slot in self.generators:
                self.noise[slot].uniform_(generator=self.generators[slot])  # type: ignore[index]

    def _captured(self, sampled: bool) -> Any:
        """The step as a graph. It is run before, for kernels to be compiled, and what that changed is put back."""
        kept = [tensor.clone() for tensor in (self.tokens, self.positions)]
        graph = torch.cuda.CUDAGraph()
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._advance(sampled)
                    self.positions.copy_(kept[1])
            torch.cuda.current_stream().wait_stream(stream)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self._pool):
                self._advance(sampled)
        finally:
            for tensor, value in zip((self.tokens, self.positions), kept, strict=True):
                tensor.copy_(value)
        return graph


def _shared_length(read: Sequence[int], prompt: Sequence[int]) -> int:
    """How many of a prompt's first tokens a place has read; at least one is left, whose logits are wanted."""
    most = min(len(read), len(prompt) - 1)
    return next((i for i in range(most) if read[i] != prompt[i]), most)


class Arrival:
    """Tokens on their way to the host.

    Args:
        tokens: on the device.
        host: where they go, pinned.
    """

    def __init__(self, tokens: torch.Tensor, host: torch.Tensor) -> None:
        self._host = host
        self._host.copy_(tokens, non_blocking=True)
        self._event = None
        if tokens.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[int]:
        """The tokens of all places, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
