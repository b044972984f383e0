"""Sequences that are decoded together, a token each a step: their cache, and the step as a CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llm_at_home.generation.reply import COLDEST, Sampling
from llm_at_home.generation.static.layers import Decoder, Segment, to_device
from llm_at_home.generation.static.pages import PAGE, SCRAP, Pages, pages_of
from llm_at_home.hardware.capture import captured

PROMPT_PART = 4096  # tokens of prompts that are read at once, which bounds the memory of their activations
SEEN_PART = 32768  # tokens that these attend to, known ones included, which bounds the memory of what is gathered
# Of a GPU, beside the weights and the pages: activations, the graph, what loads later. On small cards an eighth.
RESERVE_BYTES = 5e9


@dataclass(eq=False)
class Asked:
    """A prompt and its answer so far.

    Args:
        prompt: token ids.
        sampling: how its tokens are chosen; its seed is its own, whatever is read or decoded beside it.
        tokens: of the answer; who asked adds them as they come.
        generator: of its samples, from the first on.
        reused: tokens of the prompt that were not read, since an earlier turn's were known.
    """

    prompt: Sequence[int]
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    generator: torch.Generator | None = None
    reused: int = 0

    @property
    def so_far(self) -> list[int]:
        """What is to be read before the next token can be told."""
        return [*self.prompt, *self.tokens]


class Slots:
    """Places for sequences, each filled by :meth:`admit`; :meth:`launch` decodes one token of every one.

    Their keys and values lie in pages of PAGE tokens, which a place gets as its sequence grows. When none is left, what
    was kept of finished conversations is given up; then the youngest sequence is set back: admitted again, it is read
    with the tokens that it has, and its next one is drawn by the same generator. The oldest is never set back, and the
    pool holds at least one sequence of full length, so that each comes to its end.

    Args:
        model: a causal language model of the Llama family, on its device.
        count: of places.
        longest: tokens of the longest prompt with its answer.
        operations: the module ``kernels`` or ``reference``.
        capture: whether a step is captured as a CUDA graph.
        end_ids: tokens that end an answer.
        pages: of the pool; by default enough for all places at full length. On a GPU no more than fit.

    Raises:
        Unsupported: for a model that cannot be decoded so.
    """

    def __init__(
        self,
        model: Any,
        count: int,
        longest: int,
        operations: Any,
        capture: bool,
        end_ids: Sequence[int],
        pages: int | None = None,
    ) -> None:
        self.count, self.capture = count, capture
        self.width = pages_of(longest + 1)
        self.capacity = self.width * PAGE
        self.decoder = Decoder(model, operations, self.capacity)
        weight = self.decoder.decoder.embed_tokens.weight
        self.device = weight.device
        config = self.decoder.decoder.config
        shape = (config.num_key_value_heads, PAGE, self.decoder.head_dim)
        layers = len(self.decoder.blocks)
        scrap = int(count > 1)
        most, least = pages or count * self.width + scrap, self.width + scrap
        if most > least and self.device.type == "cuda":
            most = min(most, _fitting(2 * layers * math.prod(shape) * weight.itemsize, self.device))
        self.pages = Pages(max(most, least), count)

        def state(size: Any, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=self.device)

        def cache() -> list[torch.Tensor]:
            return [state((self.pages.count, *shape), weight.dtype) for _ in range(layers)]

        self.keys, self.values = cache(), cache()
        self.table = state((count, self.width), torch.int64) + SCRAP  # the pages of each place's positions
        self.ends = state((config.vocab_size,), torch.bool)
        self.ends[list(end_ids)] = True
        self.places = torch.arange(count, device=self.device)
        self.running: dict[int, Asked] = {}  # the oldest first
        self._read: list[list[int]] = [[] for _ in range(count)]  # whose keys and values each place holds
        self._lengths = [0] * count  # of what each place holds, decoded tokens that are on their way included
        self.tokens, self.positions, self.active = (state((count,), torch.int64) for _ in range(3))
        self.temperatures = state((count, 1), torch.float32)
        self.endless = state((count, 1), torch.bool)
        self.noise: torch.Tensor | None = None  # only sampled answers need it
        self.not_captured: str | None = None  # why there is no graph after all
        self._graphs: dict[bool, Any] = {}
        self._pool: Any = None
        pinned = self.device.type == "cuda"
        self._arrived = [torch.empty((count,), dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._turn = 0

    def choose(self, asked: Iterable[Asked], free: Iterable[int]) -> list[int]:
        """Places for the first of those who ask, as many as are read in one pass; none where pages are wanting.

        A pass reads PROMPT_PART tokens, or a longer prompt alone. Each gets the place that has read most of it already;
        else the one that has least to lose. Beside its pages one is left for every sequence that runs, lest it be set
        back at once.

        Args:
            asked: in the order in which they are to be read.
            free: places without a sequence.
        """
        left, unread, seen = list(free), 0, 0
        chosen: list[int] = []
        available = self.pages.available - sum(len(self.pages.held[slot]) < self.width for slot in self.running)
        for one in asked:
            ids = one.so_far
            needed = pages_of(len(ids) + 1)
            available -= needed
            if not left or ((chosen or self.running) and available < 0):
                break
            shared = {slot: _shared_length(self._read[slot], ids) for slot in left}
            best = max(left, key=lambda slot: (shared[slot], -len(self._read[slot])))
            unread += len(ids) - shared[best]
            seen += len(ids)
            if chosen and (unread > PROMPT_PART or seen > SEEN_PART):
                break
            available -= needed < self.width
            chosen.append(best)
            left.remove(best)
        return chosen

    @torch.inference_mode()
    def admit(self, entries: Mapping[int, Asked]) -> list[int]:
        """Read prompts into places in one pass and return the first new token of each.

        What a place has read of its prompt already, in an earlier turn, is not read again. A prompt alone that is
        longer than PROMPT_PART is read in parts of that many tokens.

        Args:
            entries: who asks, by place; the place's earlier sequence is forgotten.

        Raises:
            ValueError: when a prompt and its answer are longer than a place.
        """
        for one in entries.values():
            asked = len(one.prompt), one.sampling.max_new_tokens
            if sum(asked) >= self.capacity:
                raise ValueError(f"{asked[0]} + {asked[1]} tokens do not fit into {self.capacity}")
        whole = {slot: one.so_far for slot, one in entries.items()}
        for slot, one in entries.items():
            self._lengths[slot] = known = _shared_length(self._read[slot], whole[slot])
            self._read[slot] = whole[slot][:known]
            if not one.tokens:
                one.reused = known
            self.running[slot] = one
            self.pages.use(slot, pages_of(len(whole[slot])))
        for slot, ids in whole.items():
            self._grow(slot, len(ids))
        self._write_table()
        for slot, ids in whole.items():
            while len(ids) - self._lengths[slot] > PROMPT_PART:
                self._pass({slot: ids[: self._lengths[slot] + PROMPT_PART]})
        logits = self._pass(whole)
        settings = [[slot, len(whole[slot]), one.sampling.ignore_eos] for slot, one in entries.items()]
        at, lengths, endless = to_device(torch.tensor(settings).T, self.device)
        temperatures = [[one.sampling.temperature] for one in entries.values()]
        self.positions[at] = lengths
        self.active.index_fill_(0, at, 1)
        self.temperatures[at] = to_device(torch.tensor(temperatures), self.device)
        self.endless[at] = endless[:, None].bool()
        for one in entries.values():
            if one.sampling.temperature > 0 and one.generator is None:
                one.generator = torch.Generator(self.device).manual_seed(one.sampling.seed)
        sampled = any(one.generator for one in entries.values())
        if sampled and self.noise is None:
            shape = (self.count, logits.shape[-1])
            self.noise = torch.full(shape, 0.5, dtype=torch.float32, device=self.device)
        self._draw(entries)
        self.tokens[at] = chosen = self._choose(logits.float(), at, sampled)
        return chosen.tolist()

    def _pass(self, prompts: Mapping[int, Sequence[int]]) -> torch.Tensor:
        """Read what each place has not read of its prompt; logits of shape (prompts, vocabulary)."""
        known = self._lengths
        segments = [Segment(slot, known[slot], len(ids) - known[slot]) for slot, ids in prompts.items()]
        tokens = [token for slot, ids in prompts.items() for token in ids[known[slot] :]]
        logits = self.decoder.prompts(tokens, segments, self.table, self.keys, self.values)
        for slot, ids in prompts.items():
            self._read[slot], self._lengths[slot] = list(ids), len(ids)
        return logits

    def release(self, slot: int) -> None:
        """Empty a place; what it has read is kept for a prompt that begins in the same way.

        Its position stays behind what is kept, since every step writes there.
        """
        self._read[slot] = self.running[slot].so_far[: self._lengths[slot]]
        self._stop(slot)
        self.pages.keep(slot)

    def _stop(self, slot: int) -> None:
        del self.running[slot]
        self.active[slot] = 0
        self.temperatures[slot] = 0

    def _grow(self, slot: int, tokens: int) -> None:
        """Let a place hold so many tokens, whatever others have kept."""
        for other in self.pages.grow(slot, pages_of(tokens)):
            self._read[other] = []

    def _make_room(self) -> list[int]:
        """A page for the next token of each sequence; the places that were set back for it, the youngest first."""
        set_back: list[int] = []
        for slot in list(self.running):
            wanting = pages_of(self._lengths[slot] + 1) > len(self.pages.held[slot])
            while slot in self.running and wanting and not self.pages.available:
                youngest = next(reversed(self.running))
                self._stop(youngest)
                self.pages.drop(youngest)
                self._read[youngest] = []
                set_back.append(youngest)
            if slot in self.running:
                self._grow(slot, self._lengths[slot] + 1)
        self._write_table()
        return set_back

    def _write_table(self) -> None:
        """Tell the device whose pages are whose, after what it does now."""
        if self.pages.changed:
            rows = [[*held, *[SCRAP] * (self.width - len(held))] for held in self.pages.held]
            self.table.copy_(to_device(torch.tensor(rows), self.device))
            self.pages.changed = False

    def forget(self) -> None:
        """Read every prompt anew from now on."""
        self._read = [[] for _ in range(self.count)]
        for slot in set(range(self.count)) - set(self.running):
            self.pages.drop(slot)

    @torch.inference_mode()
    def launch(self) -> Arrival:
        """Start the step that decodes the next token of every place, and return where they will arrive.

        Who was set back for it, ``Arrival.set_back``, gets none: they are to be admitted again as soon as they can be.
        """
        set_back = self._make_room()
        sampled = any(one.generator for one in self.running.values())
        if self.capture and sampled not in self._graphs:
            try:
                self._graphs[sampled] = self._captured(sampled)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # a layer that waits for the device, say
                self.capture, self.not_captured = False, str(error).splitlines()[0]
        self._draw(self.running)
        if self.capture:
            self._graphs[sampled].replay()
        else:
            self._advance(sampled)
        for slot in self.running:
            self._lengths[slot] += 1
        self._turn = 1 - self._turn
        return Arrival(self.tokens, self._arrived[self._turn], set_back)

    def _advance(self, sampled: bool) -> None:
        last = self.positions * self.active  # empty places look at one token only
        logits = self.decoder.next_token(
            self.tokens, self.positions, last, self.places, self.table, self.keys, self.values
        ).float()
        self.tokens.copy_(self._choose(logits, slice(None), sampled))
        self.positions.add_(self.active)

    def _choose(self, logits: torch.Tensor, part: slice | torch.Tensor, sampled: bool) -> torch.Tensor:
        """The likeliest tokens, or by temperature: the largest of logits with Gumbel noise is a sample."""
        scores = logits.masked_fill(self.ends & self.endless[part], float("-inf"))
        if sampled and self.noise is not None:
            warm = self.temperatures[part]
            drawn = scores / warm.clamp(min=COLDEST) - (-self.noise[part].log()).log()
            scores = torch.where(warm > 0, drawn, scores)
        return scores.argmax(-1)

    def _draw(self, slots: Iterable[int]) -> None:
        for slot in slots:
            generator = self.running[slot].generator
            if generator is not None and self.noise is not None:
                self.noise[slot].uniform_(generator=generator)

    def _captured(self, sampled: bool) -> Any:
        """The step as a graph. It is run before, for kernels to be compiled, and what that changed is put back."""
        kept = [tensor.clone() for tensor in (self.tokens, self.positions)]
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
            graph, _ = captured(lambda: self._advance(sampled), stream, self._pool)
        finally:
            for tensor, value in zip((self.tokens, self.positions), kept, strict=True):
                tensor.copy_(value)
        return graph


def _fitting(size: int, device: torch.device) -> int:
    """How many pages of so many bytes fit beside what a GPU holds already, and a reserve."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int((free - min(RESERVE_BYTES, total / 8)) // size)


def _shared_length(read: Sequence[int], prompt: Sequence[int]) -> int:
    """How many of a prompt's first tokens a place has read; at least one is left, whose logits are wanted."""
    most = min(len(read), len(prompt) - 1)
    return next((i for i in range(most) if read[i] != prompt[i]), most)


class Arrival:
    """Tokens on their way to the host.

    Args:
        tokens: on the device.
        host: where they go, pinned.
        set_back: places whose sequences were set back before this step, the youngest first.
    """

    def __init__(self, tokens: torch.Tensor, host: torch.Tensor, set_back: Sequence[int]) -> None:
        self.set_back = set_back
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
