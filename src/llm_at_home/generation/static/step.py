"""The step that decodes a token of each sequence: what it holds on the device, and CUDA graphs of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from llm_at_home.generation.reply import COLDEST
from llm_at_home.generation.static.asked import Asked
from llm_at_home.generation.static.layers import Decoder, to_device
from llm_at_home.hardware.capture import captured


class Step:
    """Decodes the next token of every sequence that runs.

    It has as many rows as there are sequences, rounded up to a power of two where it is captured: a graph of each size
    is made when it is needed, and replayed from then on.

    Args:
        decoder: what is computed.
        keys: the cache of each layer; see :meth:`Decoder.next_token`.
        values: the same.
        table: the pages of each place, int64 of shape (places, pages of the longest); others write it.
        ends: whether a token ends an answer, of shape (vocabulary,).
        capture: whether the step is captured as a CUDA graph.

    Attributes:
        tokens: the last token of each place, int64 of shape (places,).
        not_captured: why there is no graph after all, or None.
    """

    def __init__(
        self,
        decoder: Decoder,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        table: torch.Tensor,
        ends: torch.Tensor,
        capture: bool,
    ) -> None:
        self.decoder, self.keys, self.values, self.table, self.ends = decoder, keys, values, table, ends
        self.count, self.device, self.capture = len(table), table.device, capture
        self.tokens, self.positions, self.active = (self._state((self.count,), torch.int64) for _ in range(3))
        self.temperatures = self._state((self.count, 1), torch.float32)
        self.endless = self._state((self.count, 1), torch.bool)
        self.noise: torch.Tensor | None = None  # only sampled answers need it
        self.places = torch.arange(self.count, device=self.device)
        self.rows = self.places.clone()  # whose tokens a step decodes that is smaller than all places
        self._order = list(range(self.count))  # the same, on the host
        self.not_captured: str | None = None
        self._graphs: dict[tuple[bool, int], Any] = {}
        self._pool: Any = None
        self._stream: Any = None

    def _state(self, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=self.device)

    def begin(self, logits: torch.Tensor, entries: Mapping[int, Asked]) -> list[int]:
        """Take sequences whose prompts have been read into their places, and choose the next token of each.

        Args:
            logits: after each prompt, of shape (sequences, vocabulary).
            entries: whose they are, by place.
        """
        settings = [[slot, len(one.so_far), one.sampling.ignore_eos] for slot, one in entries.items()]
        at, lengths, endless = to_device(torch.tensor(settings).T, self.device)
        temperatures = torch.tensor([[float(one.sampling.temperature)] for one in entries.values()])
        self.positions[at] = lengths
        self.active.index_fill_(0, at, 1)
        self.temperatures[at] = to_device(temperatures, self.device)
        self.endless[at] = endless[:, None].bool()
        for one in entries.values():
            if one.sampling.temperature > 0 and one.generator is None:
                one.generator = torch.Generator(self.device).manual_seed(one.sampling.seed)
        sampled = any(one.generator for one in entries.values())
        if sampled and self.noise is None:
            self.noise = self._state((self.count, logits.shape[-1]), torch.float32) + 0.5
        self._draw(entries.items())
        self.tokens[at] = chosen = self._choose(logits.float(), at, sampled)
        return chosen.tolist()

    def stop(self, slot: int) -> None:
        """Decode no more of a place."""
        self.active[slot] = 0
        self.temperatures[slot] = 0

    def run(self, running: Mapping[int, Asked]) -> None:
        """Start the step; ``tokens`` has the next ones when it is done.

        Args:
            running: the sequences by place, all of which have begun.
        """
        sampled = any(one.generator for one in running.values())
        kind = sampled, self._line_up(running)
        if self.capture and kind not in self._graphs:
            try:
                self._graphs[kind] = self._captured(*kind)
            except torch.OutOfMemoryError:
                # A larger step does what this one does, and one that samples what one does that does not.
                larger = [(size, samples) for samples, size in self._graphs if samples >= sampled and size >= kind[1]]
                if not larger:
                    raise
                self._graphs[kind] = self._graphs[min(larger)[::-1]]
                self._pool = self._stream = None  # they take no further capture
            except RuntimeError as error:  # a layer that waits for the device, say
                self.capture, self.not_captured = False, str(error).splitlines()[0]
        self._draw(running.items())
        if self.capture:
            self._graphs[kind].replay()
        else:
            self._advance(*kind)

    def _line_up(self, running: Mapping[int, Asked]) -> int:
        """How many rows the step has; those of the sequences come first, then of places that are empty."""
        size = len(running)
        if self.capture:
            size = min(self.count, 1 << (size - 1).bit_length())
        if size < self.count:
            order = [*running, *(slot for slot in range(self.count) if slot not in running)]
            if order != self._order:
                self.rows.copy_(to_device(torch.tensor(order), self.device))
                self._order = order
        return size

    def _advance(self, sampled: bool, size: int) -> None:
        rows: slice | torch.Tensor = slice(None) if size == self.count else self.rows[:size]
        tokens, positions, active, table = (one[rows] for one in (self.tokens, self.positions, self.active, self.table))
        last = positions * active  # empty places look at one token only
        logits = self.decoder.next_token(
            tokens, positions, last, self.places[:size], table, self.keys, self.values
        ).float()
        self.tokens[rows] = self._choose(logits, rows, sampled)
        self.positions.add_(self.active)

    def _choose(self, logits: torch.Tensor, part: slice | torch.Tensor, sampled: bool) -> torch.Tensor:
        """The likeliest tokens, or by temperature: the largest of logits with Gumbel noise is a sample."""
        scores = logits.masked_fill(self.ends & self.endless[part], float("-inf"))
        if sampled and self.noise is not None:
            warm = self.temperatures[part]
            drawn = scores / warm.clamp(min=COLDEST) - (-self.noise[part].log()).log()
            scores = torch.where(warm > 0, drawn, scores)
        return scores.argmax(-1)

    def _draw(self, sequences: Iterable[tuple[int, Asked]]) -> None:
        for slot, one in sequences:
            if one.generator is not None and self.noise is not None:
                self.noise[slot].uniform_(generator=one.generator)

    def _captured(self, sampled: bool, size: int) -> Any:
        """The step as a graph. It is run before, for kernels to be compiled, and what that changed is put back."""
        kept = [tensor.clone() for tensor in (self.tokens, self.positions)]
        try:
            if self._stream is None:
                self._stream = torch.cuda.Stream()  # one for all sizes: cuBLAS keeps a workspace for each
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(2):
                    self._advance(sampled, size)
                    self.positions.copy_(kept[1])
            torch.cuda.current_stream().wait_stream(self._stream)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph, _ = captured(lambda: self._advance(sampled, size), self._stream, self._pool)
        finally:
            for tensor, value in zip((self.tokens, self.positions), kept, strict=True):
                tensor.copy_(value)
        return graph
