"""How often a judge may be asked: requests and tokens in any sixty seconds, over all threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 60.0


class RateLimit:
    """A sliding window. A request that alone exceeds the tokens of a minute goes out when nothing else is in it.

    Args:
        requests_per_minute: None is without a limit.
        tokens_per_minute: of prompts and the longest allowed replies, as providers count them; None likewise.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests = requests_per_minute
        self._tokens = tokens_per_minute
        self._clock = clock
        self._sent: deque[tuple[float, int]] = deque()
        self._guard = threading.Lock()

    def wait(self, tokens: int, sleep: Callable[[float], object]) -> None:
        """Sleep until one more request with this many tokens fits, and enter it; a true ``sleep`` gives up waiting."""
        if self._requests is None and self._tokens is None:
            return
        while pause := self._enter(tokens):
            if sleep(pause):
                return

    def _enter(self, tokens: int) -> float:
        """0 when the request was entered, else the seconds until it is worth trying again."""
        with self._guard:
            now = self._clock()
            while self._sent and now - self._sent[0][0] >= WINDOW_S:
                self._sent.popleft()
            too_many = self._requests is not None and len(self._sent) >= self._requests
            too_long = self._tokens is not None and sum(n for _, n in self._sent) + tokens > self._tokens
            if self._sent and (too_many or too_long):
                return max(WINDOW_S - (now - self._sent[0][0]), 0.001)
            self._sent.append((now, tokens))
            return 0.0
