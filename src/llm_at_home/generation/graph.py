"""The graph engine: a static cache, prompts read into it, and one captured step for every token."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llm_at_home.generation.eager import EagerEngine, TokenClock
from llm_at_home.generation.reply import Reply, Sampling
from llm_at_home.generation.static.asked import Asked
from llm_at_home.generation.static.layers import Unsupported, decoder_of, uncapturable
from llm_at_home.generation.static.slots import Slots
from llm_at_home.hardware.device import runs_triton


class GraphEngine(EagerEngine):
    """Answers with one CUDA graph replayed for each token, so that the card does not wait for Python.

    Where that cannot be, it answers as the eager engine does, and ``describe`` says why.

    Args:
        model: as the eager engine's.
        tokenizer: as the eager engine's.
        max_new_tokens: the longest answer, in tokens.
        temperature: for every question, or None for the published one of its category.
        batch_size: conversations that are decoded together; a finished one's place is filled at once.
        warmup_tokens: decoded before anything is measured.
        kernels: ``triton``, ``torch``, or ``auto``: Triton's on a card that it supports.
        pages: of the cache, of 256 tokens; by default enough for all places at full length. On a GPU no more than fit:
            places share them, and where none is left an answer waits, to go on later from where it was.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_new_tokens: int,
        temperature: float | None = None,
        batch_size: int = 1,
        warmup_tokens: int = 16,
        kernels: str = "auto",
        pages: int | None = None,
    ) -> None:
        super().__init__(model, tokenizer, max_new_tokens, temperature, batch_size, warmup_tokens)
        self.operations, self.kernels = _operations(kernels, model.device)
        self.pages = pages
        self.capture = model.device.type == "cuda"
        self._slots: Slots | None = None
        self.eager_because = self._obstacle()

    def _obstacle(self) -> str | None:
        try:
            decoder_of(self.model)
        except Unsupported as reason:
            return str(reason)
        return uncapturable(self.model) if self.capture else None

    def describe(self) -> dict[str, Any]:
        """Which linear layers run, and what decodes: the graph, or why not."""
        engine = f"eager, since {self.eager_because}" if self.eager_because else self._engine()
        return super().describe() | {"engine": engine}

    def _engine(self) -> str:
        graph = "one CUDA graph a step" if self.capture else "no graph"
        if self._slots is not None and self._slots.step.not_captured:
            graph = f"no graph, since {self._slots.step.not_captured}"
        return f"static cache, {self.kernels} kernels, {graph}"

    def use_adapter(self, name: str | None) -> None:
        """As the eager engine's; what was captured with another adapter is thrown away."""
        super().use_adapter(name)
        self.close()

    def close(self) -> None:
        """Let go of the cache and the graphs; the next answer makes them anew."""
        self._slots = None

    def forget(self) -> None:
        """Read every prompt anew, also one that begins as an earlier conversation did."""
        if self._slots is not None:
            self._slots.forget()

    def reply(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        on_text: Callable[[str], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Reply:
        """As the eager engine's."""
        if self.eager_because:
            return super().reply(prompt, sampling, on_text, should_stop)
        clock = TokenClock(self.tokenizer if on_text else None, on_text)
        clock.put(torch.tensor([list(prompt)]))
        start = time.perf_counter()
        slots = self._room(1, len(prompt) + sampling.max_new_tokens)
        one = _Sequence(prompt, sampling, start=start, times=clock.times)
        tokens = one.tokens
        tokens += slots.admit({0: one})
        clock.put(torch.tensor(tokens))
        ends = set() if sampling.ignore_eos else self.end_ids
        stopped = False
        while tokens[-1] not in ends and len(tokens) < sampling.max_new_tokens:
            stopped = bool(should_stop and should_stop())
            if stopped:
                break
            tokens.append(slots.decode()[1][0])
            clock.put(torch.tensor(tokens[-1:]))
        clock.end()
        slots.release(0)
        reply = self._reply(one)
        if stopped:
            reply.finish_reason = "stopped"
        return reply

    def reply_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Reply]:
        """Answer several prompts at once; each is sampled by its own seed, which counts on from the batch's."""
        if self.eager_because:
            return super().reply_batch(prompts, sampling)
        seeds = range(sampling.seed, sampling.seed + len(prompts))
        wanted = [
            (prompt, Sampling(sampling.max_new_tokens, sampling.temperature, seed, sampling.ignore_eos))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        found = dict(self.stream(enumerate(wanted), len(prompts)))
        return [found[i] for i in range(len(prompts))]

    def stream(
        self,
        requests: Iterable[tuple[Any, tuple[Sequence[int], Sampling]]],
        count: int | None = None,
        longest: int | None = None,
        then: Callable[[Any, Reply], tuple[Any, tuple[Sequence[int], Sampling]] | None] | None = None,
    ) -> Iterable[tuple[Any, Reply]]:
        """Answers as they are finished, with their keys; a finished one's place is filled at once.

        Prompts for which there is a place are read together, and share their time to the first token: from the start of
        the pass that read them until their first tokens are on the host.

        Args:
            requests: key, and prompt with sampling.
            count: of places; by default the engine's batch size.
            longest: tokens of the longest prompt with its answer, follow-ups included; by default that of ``requests``.
            then: called with each finished answer; may give a request that follows it.
        """
        waiting = [_Sequence(prompt, sampling, key=key) for key, (prompt, sampling) in requests][::-1]
        if not waiting:
            return
        needed = longest or max(len(one.prompt) + one.sampling.max_new_tokens for one in waiting)
        slots = self._room(min(count or self.batch_size, len(waiting)), needed)
        running: dict[int, _Sequence] = {}
        ends = self.end_ids
        try:
            while waiting or running:
                free = [slot for slot in range(slots.count) if slot not in running]
                while free and waiting:
                    start = time.perf_counter()
                    chosen = {slot: waiting.pop() for slot in slots.choose(reversed(waiting), free)}
                    if not chosen:
                        break  # until others leave their pages
                    first = slots.admit(chosen)
                    now = time.perf_counter()
                    running |= chosen
                    for one, token in zip(chosen.values(), first, strict=True):
                        one.start = one.start if one.times else start
                        one.add(token, now)
                    for slot, one in chosen.items():
                        if one.is_done(ends):
                            del running[slot]
                            slots.release(slot)
                            yield one.key, self._finish(one, then, waiting)
                    free = [slot for slot in free if slot not in running]
                if not running:
                    continue
                set_back, tokens = slots.decode()
                waiting += [running.pop(slot) for slot in set_back]
                now = time.perf_counter()
                for slot, token in tokens.items():
                    one = running[slot]
                    one.add(token, now)
                    if one.is_done(ends):
                        del running[slot]
                        slots.release(slot)
                        yield one.key, self._finish(one, then, waiting)
        finally:
            for slot in list(slots.running):
                slots.release(slot)

    def places(self, tokens: int) -> Slots:
        """The engine's places, each for a prompt and answer of so many tokens; those there are kept if they do."""
        return self._room(self.batch_size, tokens)

    def _finish(self, one: _Sequence, then: Any, waiting: list[_Sequence]) -> Reply:
        reply = self._reply(one)
        following = then(one.key, reply) if then else None
        if following is not None:
            key, (prompt, sampling) = following
            waiting.append(_Sequence(prompt, sampling, key=key))
        return reply

    def _reply(self, one: _Sequence) -> Reply:
        steps = [b - a for a, b in itertools.pairwise(one.times)]
        first = one.times[0] - one.start
        reason = self._finish_reason(one.tokens)
        text = self._decode(one.tokens)
        return Reply(text, one.tokens, len(one.prompt), reason, first, steps, one.reused, one.times[0])

    def _room(self, count: int, tokens: int) -> Slots:
        """Places for sequences of so many tokens; those there are kept if they are enough."""
        slots = self._slots
        if slots is not None and slots.count == count and slots.capacity > tokens:
            return slots
        self._slots = slots = None  # both names: the memory is free before the new ones take theirs
        ends = sorted(self.end_ids)
        self._slots = Slots(self.model, count, tokens, self.operations, self.capture, ends, self.pages)
        return self._slots


@dataclass(eq=False)
class _Sequence(Asked):
    """An answer in the making, with when it was begun and when its tokens came."""

    key: Any = None
    start: float = 0.0
    times: list[float] = field(default_factory=list)

    def add(self, token: int, now: float) -> None:
        """The next token is there."""
        self.tokens.append(token)
        self.times.append(now)

    def is_done(self, ends: set[int]) -> bool:
        """Whether the last token was the last one."""
        ended = self.tokens[-1] in ends and not self.sampling.ignore_eos
        return ended or len(self.tokens) >= self.sampling.max_new_tokens


def _operations(kernels: str, device: torch.device) -> tuple[Any, str]:
    from llm_at_home.generation.static import reference

    if kernels == "auto":
        kernels = "triton" if runs_triton(device) else "torch"
    if kernels == "triton":
        from llm_at_home.generation.static import kernels as triton_kernels

        return triton_kernels, kernels
    return reference, kernels
