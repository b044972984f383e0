"""What judging costs: prices from the configuration, and a limit that no request is sent beyond."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from llm_at_home.records.schema import Reading

# An estimate from the text's length, and one that is to be on the safe side: a hosted model's tokenizer is not at hand.
CAUTIOUS_BYTES_PER_TOKEN = 3
USUAL_BYTES_PER_TOKEN = 4
_MILLION = 1e6


class OverBudget(Exception):
    """The next request could cost more than what is left."""


class Budget:
    """Counts what was spent, and refuses what could exceed the limit. Safe to use from several threads.

    Each request reserves its worst case (the prompt, cautiously estimated, and the longest reply) before it is sent, so
    requests under way together cannot exceed the limit either.

    Args:
        prices: ``input`` and ``output`` in US dollars a million tokens, ``source``; None where nobody knows.
        max_usd: the limit; None is without one.
        share: what a request costs of its price, as with a batch discount.
    """

    def __init__(
        self, prices: Mapping[str, Any] | None = None, max_usd: float | None = None, share: float = 1.0
    ) -> None:
        self._input: float | None = (prices or {}).get("input")
        self._output: float | None = (prices or {}).get("output")
        self._source = (prices or {}).get("source")
        self.max_usd = max_usd
        self.share = share
        self.spent = 0.0
        self._reserved = 0.0
        self._unclear = 0
        self._guard = threading.Lock()

    @property
    def is_priced(self) -> bool:
        """Whether prices are known."""
        return self._input is not None and self._output is not None

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """US dollars; 0 without prices, which :attr:`is_priced` tells from free."""
        if self._input is None or self._output is None:
            return 0.0
        return self.share * (prompt_tokens * self._input + completion_tokens * self._output) / _MILLION

    def reserve(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Set a request's worst case aside and return it, for :meth:`release`.

        Raises:
            OverBudget: when that would exceed the limit.
        """
        worst = self.cost(prompt_tokens, completion_tokens)
        with self._guard:
            if self.max_usd is not None and self.spent + self._reserved + worst > self.max_usd:
                raise OverBudget(
                    f"judge.max_cost_usd={self.max_usd:g}: {self.spent:.4f} USD are spent, the next request could cost "
                    f"{worst:.4f}; what was judged is kept, and the same command with a higher limit goes on"
                )
            self._reserved += worst
        return worst

    def release(self, reserved: float, *, billed: bool) -> None:
        """Give a reservation back, or count it as spent when the request may have been billed without a reply."""
        with self._guard:
            self._reserved -= reserved
            if billed:
                self.spent += reserved
                self._unclear += 1

    def spend(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count an answered request."""
        with self._guard:
            self.spent += self.cost(prompt_tokens, completion_tokens)

    def reading(self) -> Reading:
        """What this run spent, for its record."""
        if not self.is_priced:
            return Reading.unknown("USD", "no price is known: set judge.prices.input and judge.prices.output", "usage")
        method = f"usage at list price ({self._source})" if self._source else "usage at list price"
        if self._unclear:
            method += f", {self._unclear} requests without a reply counted in full"
        return Reading(self.spent, "USD", method)


def estimate_tokens(messages: Sequence[Mapping[str, str]], bytes_per_token: int = CAUTIOUS_BYTES_PER_TOKEN) -> int:
    """Tokens of a conversation by the length of its text; no tokenizer of a hosted model is at hand offline."""
    return sum(math.ceil(len(message["content"].encode()) / bytes_per_token) for message in messages)
