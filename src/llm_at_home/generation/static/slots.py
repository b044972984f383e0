"""Sequences that are decoded together: their places, and the pages of their keys and values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from llm_at_home.generation.static.asked import Asked
from llm_at_home.generation.static.layers import Decoder, Segment, to_device
from llm_at_home.generation.static.pages import PAGE, SCRAP, Pages, pages_of
from llm_at_home.generation.static.step import Step

PROMPT_PART = 4096  # tokens of prompts that are read at once, which bounds the memory of their activations
SEEN_PART = 32768  # tokens that these attend to, known ones included, which bounds the memory of what is gathered
# Of a GPU, beside the weights and the pages: activations, the graph, what loads later. On small cards an eighth.
RESERVE_BYTES = 5e9


class Slots:
    """Places for sequences, each filled by :meth:`admit`; :meth:`decode` gives one token of every one.

    On a GPU the next step is under way while the tokens of one are looked at, so that the card does not wait for the
    host; a sequence that ends has then been decoded a token too far.

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
        self.count = count
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
        ends = state((config.vocab_size,), torch.bool)
        ends[list(end_ids)] = True
        self.step = Step(self.decoder, self.keys, self.values, self.table, ends, capture)
        self.running: dict[int, Asked] = {}  # the oldest first
        self._read: list[list[int]] = [[] for _ in range(count)]  # whose keys and values each place holds
        self._lengths = [0] * count  # of what each place holds, decoded tokens that are on their way included
        pinned = self.device.type == "cuda"
        self._arrived = [torch.empty((count,), dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._turn = 0
        self.ahead = self.device.type == "cuda"  # a CPU would only be later with every token
        self._under_way: Arrival | None = None

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
        return self.step.begin(logits, entries)

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
        self.step.stop(slot)
        if not self.running:
            self._under_way = None

    def _grow(self, slot: int, tokens: int) -> None:
        """Let a place hold so many tokens, whatever others have kept."""
        for other in self.pages.grow(slot, pages_of(tokens)):
            self._read[other] = []

    def _is_short(self) -> bool:
        """Whether somebody would have to be set back for the next step."""
        wanting = sum(pages_of(self._lengths[slot] + 1) > len(self.pages.held[slot]) for slot in self.running)
        return wanting > self.pages.available

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

    def decode(self) -> tuple[list[int], dict[int, int]]:
        """The next token of every sequence that runs, while the card is at the one after it.

        Whoever asked adds the tokens to their sequences (``Asked.tokens``) and releases those that are done.

        Returns:
            The places that were set back for it, the youngest first, which get no token: they are to be admitted again
            as soon as they can be; and the tokens of the others, by place.
        """
        set_back: list[int] = []
        if self._under_way is None:
            self._under_way = self.launch()
            set_back = self._under_way.set_back
        going, self._under_way = self._under_way, None
        if self.ahead and self._goes_on(going) and not self._is_short():
            self._under_way = self.launch()
        tokens = going.wait()
        return set_back, {slot: tokens[slot] for slot, one in going.whose.items() if self.running.get(slot) is one}

    def _goes_on(self, going: Arrival) -> bool:
        """Whether any answer is longer than it will be after the step that is under way."""
        return any(
            len(one.tokens) + (going.whose.get(slot) is one) < one.sampling.max_new_tokens
            for slot, one in self.running.items()
        )

    @torch.inference_mode()
    def launch(self) -> Arrival:
        """Start the step that decodes the next token of every place, and return where they will arrive.

        Who was set back for it, ``Arrival.set_back``, gets none.
        """
        set_back = self._make_room()
        self.step.run(self.running)
        for slot in self.running:
            self._lengths[slot] += 1
        self._turn = 1 - self._turn
        return Arrival(self.step.tokens, self._arrived[self._turn], set_back, dict(self.running))


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
        whose: the sequences that the tokens are of, by place.
    """

    def __init__(
        self, tokens: torch.Tensor, host: torch.Tensor, set_back: list[int], whose: Mapping[int, Asked]
    ) -> None:
        self.set_back, self.whose = set_back, whose
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
