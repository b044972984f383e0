"""Sequences that are decoded together, a token each a step: their cache, and the step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from llm_at_home.generation.reply import Sampling
from llm_at_home.generation.static.layers import Decoder, Segment, to_device

PROMPT_PART = 4096  # tokens of prompts that are read at once, which bounds the memory of their activations


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
        self.ends = torch.zeros((config.vocab_size,), dtype=torch.bool, device=self.device)
        self.ends[list(end_ids)] = True
        self.places = torch.arange(count, device=self.device)
        self.reused = [0] * count  # tokens of each place's prompt that were not read again
        self._read: list[list[int]] = [[] for _ in range(count)]  # whose keys and values each place holds

        def state(size: Any, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=self.device)

        self.tokens, self.positions, self.active = (state((count,), torch.int64) for _ in range(3))
        self.temperatures = state((count, 1), torch.float32)
        self.endless = state((count, 1), torch.bool)
        self.noise: torch.Tensor | None = None  # only sampled answers need it
        self.generators: dict[int, torch.Generator] = {}
        self.not_captured: str | None = None  # why there is no graph after all
        self._graphs: dict[bool, Any] = {}
        self._pool: Any = None
        pinned = self.device.type == "cuda"
        self._arrived = [torch.empty((count,), dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._turn = 0

    def choose(self, prompts: Iterable[Sequence[int]], free: Iterable[int]) -> list[int]:
        """Places for the first of the prompts, as many as one pass reads: PROMPT_PART tokens, or a longer one alone.

        Each gets the place that has read most of it already; else the one that has least to lose.

        Args:
            prompts: token ids, in the order in which they are to be read.
            free: places without a sequence.
        """
        left, unread = list(free), 0
        chosen: list[int] = []
        for prompt in prompts:
            if not left:
                break
            shared = {slot: _shared_length(self._read[slot], prompt) for slot in left}
            best = max(left, key=lambda slot: (shared[slot], -len(self._read[slot])))
            unread += len(prompt) - shared[best]
            if chosen and unread > PROMPT_PART:
                break
            chosen.append(best)
            left.remove(best)
        return chosen

    @torch.inference_mode()
    def admit(self, entries: Sequence[tuple[int, Sequence[int], Sampling]]) -> list[int]:
        """Read prompts into places in one pass and return the first new token of each.

        What a place has read of its prompt already, in an earlier turn, is not read again. A prompt alone that is
        longer than PROMPT_PART is read in parts of that many tokens.

        Args:
            entries: place, whose earlier sequence is forgotten; token ids; and how this sequence's tokens are chosen:
                its seed is its own, whatever is read or decoded beside it.

        Raises:
            ValueError: when a prompt and its answer are longer than a place.
        """
        for _, prompt, sampling in entries:
            if len(prompt) + sampling.max_new_tokens >= self.capacity:
                raise ValueError(f"{len(prompt)} + {sampling.max_new_tokens} tokens do not fit into {self.capacity}")
        for slot, prompt, _ in entries:
            self.reused[slot] = known = _shared_length(self._read[slot], prompt)
            self._read[slot] = list(prompt[:known])
        for slot, prompt, _ in entries:
            while len(prompt) - len(self._read[slot]) > PROMPT_PART:
                known = len(self._read[slot])
                self._pass([(slot, prompt[: known + PROMPT_PART])])
        logits = self._pass([(slot, prompt) for slot, prompt, _ in entries])
        settings = [[slot, len(prompt), sampling.ignore_eos] for slot, prompt, sampling in entries]
        at, lengths, endless = to_device(torch.tensor(settings).T, self.device)
        temperatures = [[sampling.temperature] for _, _, sampling in entries]
        self.positions[at] = lengths
        self.active[at] = 1
        self.temperatures[at] = to_device(torch.tensor(temperatures), self.device)
        self.endless[at] = endless[:, None].bool()
        for slot, _, sampling in entries:
            self.generators.pop(slot, None)
            if sampling.temperature > 0:
                self.generators[slot] = torch.Generator(self.device).manual_seed(sampling.seed)
        slots = [slot for slot, _, _ in entries]
        sampled = any(slot in self.generators for slot in slots)
        if sampled and self.noise is None:
            shape = (self.count, logits.shape[-1])
            self.noise = torch.full(shape, 0.5, dtype=torch.float32, device=self.device)
        self._draw(slots)
        self.tokens[at] = chosen = self._choose(logits.float(), at, sampled)
        return chosen.tolist()

    def _pass(self, prompts: Sequence[tuple[int, Sequence[int]]]) -> torch.Tensor:
        """Read what each place has not read of its prompt; logits of shape (prompts, vocabulary)."""
        starts = [len(self._read[slot]) for slot, _ in prompts]
        segments = [Segment(slot, n, len(prompt) - n) for n, (slot, prompt) in zip(starts, prompts, strict=True)]
        tokens = [token for n, (_, prompt) in zip(starts, prompts, strict=True) for token in prompt[n:]]
        logits = self.decoder.prompts(tokens, segments, self.keys, self.values)
        for slot, prompt in prompts:
            self._read[slot] = list(prompt)
        return logits

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

    def _choose(self, logits: torch.Tensor, part: slice | torch.Tensor, sampled: bool) -> torch.Tensor:
        """The likeliest tokens, or by temperature: the largest of logits with Gumbel noise is a sample."""
        scores = logits.masked_fill(self.ends & self.endless[part], float("-inf"))
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
