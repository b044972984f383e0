"""Decodes for many askers at once, in one thread that owns the model: a place is filled as soon as it is free."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_at_home.generation.reply import Sampling
from llm_at_home.generation.serving.text import Detokenizer, Stops
from llm_at_home.generation.static.asked import Asked

log = logging.getLogger(__name__)


class Busy(Exception):
    """The queue is full."""


@dataclass(eq=False)
class Request:
    """What somebody asks.

    Args:
        prompt: token ids.
        sampling: how tokens are chosen.
        adapter: the adapter that answers, or None for the base alone.
        on_text: called with each piece of text, in the scheduler's thread.
        on_end: called once, in the same thread: why it ended (``stop``, ``length``, ``cancelled`` or ``error``), and
            how many tokens there were.
        stops: strings that end the answer.
    """

    prompt: Sequence[int]
    sampling: Sampling
    adapter: str | None
    on_text: Callable[[str], None]
    on_end: Callable[[str, int], None]
    stops: Sequence[str] = ()
    cancelled: threading.Event = field(default_factory=threading.Event)


class Scheduler:
    """One thread over one engine.

    Requests are answered in their order. All that are decoded together have the same adapter: one for another adapter
    waits until those before it are done.

    Args:
        engine: a graph engine, whose places are filled; or another, which answers one request at a time.
        context: tokens of the longest prompt with its answer.
        queue: requests that may wait for a place; further ones are turned away.
    """

    def __init__(self, engine: Any, context: int, queue: int) -> None:
        self.engine, self.context, self.queue = engine, context, queue
        self.has_places = hasattr(engine, "places") and not engine.eager_because
        self._waiting: deque[_Answer] = deque()
        self._running: dict[int, _Answer] = {}
        self._adapter: Any = _UNKNOWN
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def __enter__(self) -> Scheduler:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
        self._thread.join()

    def close(self) -> None:
        """Break off every answer and take no further request; the thread ends after its present step."""
        with self._changed:
            self._closing = True
            self._cancel_all()
            self._changed.notify()

    @property
    def load(self) -> tuple[int, int]:
        """How many requests are being answered, and how many wait."""
        return len(self._running), sum(not answer.request.cancelled.is_set() for answer in list(self._waiting))

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            Busy: when as many as allowed wait for a place already.
        """
        with self._changed:
            places = self.engine.batch_size if self.has_places else 1
            # Those for whom a place is free wait as well, for the step that is under way; who has left does not count.
            if self._closing or sum(self.load) >= self.queue + places:
                raise Busy
            self._waiting.append(_Answer(request, self.engine))
            self._changed.notify()

    def _cancel_all(self) -> None:
        for answer in [*self._waiting, *self._running.values()]:
            answer.request.cancelled.set()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._closing)
                if self._closing:
                    self._cancel_all()
                    if not self._waiting and not self._running:
                        return
            try:
                self._step()
            except Exception:
                log.exception("an answer failed")
                self._fail()

    def _fail(self) -> None:
        """The askers get an error each; what comes after them is tried again from a clean start."""
        if not self._running and self._waiting:
            # It failed before it had a place, and would again.
            self._running[0] = self._waiting.popleft()
        for answer in self._running.values():
            answer.request.on_end("error", len(answer.tokens))
        self._running.clear()
        self._adapter = _UNKNOWN
        if self.has_places:
            self.engine.close()

    def _step(self) -> None:
        self._drop_who_left()
        if not self.has_places:
            if self._waiting:
                self._running[0] = self._waiting.popleft()
                self._answer_alone(self._running[0].request)
            return
        self._admit()
        if not self._running:
            return
        slots = self.engine.places(self.context)
        set_back, tokens = slots.decode()
        for slot in set_back:
            self._waiting.appendleft(self._running.pop(slot))
        for slot, token in tokens.items():
            answer = self._running[slot]
            answer.take(token)
            self._end_if_done(slots, slot, answer)

    def _drop_who_left(self) -> None:
        with self._changed:
            left = [answer for answer in self._waiting if answer.request.cancelled.is_set()]
            for answer in left:
                self._waiting.remove(answer)
        for answer in left:
            answer.end("cancelled")

    def _admit(self) -> None:
        slots = self.engine.places(self.context)
        free = [slot for slot in range(slots.count) if slot not in self._running]
        while free and self._waiting:
            request = self._waiting[0].request
            if request.adapter != self._adapter:
                if self._running:
                    return
                del slots  # their memory is free before others, for another adapter, take what there is
                self._use(request.adapter)
                slots = self.engine.places(self.context)
            alike = itertools.takewhile(self._can_start, list(self._waiting))
            started = {slot: self._waiting.popleft() for slot in slots.choose(alike, free)}
            if not started:
                return  # until others leave their pages
            self._running |= started
            for (slot, answer), token in zip(started.items(), slots.admit(started), strict=True):
                answer.take(token)
                self._end_if_done(slots, slot, answer)
            free = [slot for slot in free if slot not in self._running]

    def _can_start(self, answer: _Answer) -> bool:
        return answer.request.adapter == self._adapter and not answer.request.cancelled.is_set()

    def _end_if_done(self, slots: Any, slot: int, answer: _Answer) -> None:
        reason = answer.ending()
        if reason is not None:
            del self._running[slot]
            slots.release(slot)
            answer.end(reason)

    def _use(self, adapter: str | None) -> None:
        if self.engine.adapters:
            self.engine.use_adapter(adapter)
        self._adapter = adapter

    def _answer_alone(self, request: Request) -> None:
        if request.adapter != self._adapter:
            self._use(request.adapter)
        stops = Stops(request.stops)

        def on_text(text: str) -> None:
            if piece := stops.add(text):
                request.on_text(piece)

        def should_stop() -> bool:
            return request.cancelled.is_set() or stops.stopped

        reply = self.engine.reply(request.prompt, request.sampling, on_text=on_text, should_stop=should_stop)
        if piece := stops.end():
            request.on_text(piece)
        reason = "stop" if stops.stopped else "cancelled" if request.cancelled.is_set() else reply.finish_reason
        del self._running[0]
        request.on_end(reason, len(reply.tokens))


_UNKNOWN = object()


class _Answer(Asked):
    """An answer in the making."""

    def __init__(self, request: Request, engine: Any) -> None:
        super().__init__(request.prompt, request.sampling)
        self.request, self.ends = request, engine.end_ids
        self.text, self.stops = Detokenizer(engine.tokenizer), Stops(request.stops)

    def take(self, token: int) -> None:
        """Add a token and pass its text on."""
        self.tokens.append(token)
        if token not in self.ends:
            self._show(self.stops.add(self.text.add(token)))

    def ending(self) -> str | None:
        """Why the answer ends here, or None while it goes on."""
        if self.request.cancelled.is_set():
            return "cancelled"
        if self.stops.stopped or self.tokens[-1] in self.ends:
            return "stop"
        return "length" if len(self.tokens) >= self.request.sampling.max_new_tokens else None

    def end(self, reason: str) -> None:
        """Pass on what was held back, and the reason."""
        if reason != "cancelled":
            self._show(self.stops.add(self.text.end()) + self.stops.end())
        self.request.on_end(reason, len(self.tokens))

    def _show(self, piece: str) -> None:
        if piece:
            self.request.on_text(piece)
