"""From tokens as they come to text as it can be shown: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a tokenizer shows of a character whose other bytes are still to come


class Stops:
    """Lets text through up to a stop string, and holds back what may be the beginning of one.

    Args:
        stops: strings at which the text ends; they are not part of it.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stops = [stop for stop in stops if stop]
        self.stopped = False
        self._held = ""

    def add(self, text: str) -> str:
        """The part of the text so far that can be shown now."""
        if self.stopped:
            return ""
        self._held += text
        places = [place for place in (self._held.find(stop) for stop in self.stops) if place >= 0]
        if places:
            self.stopped = True
            return self._take(min(places), rest="")
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        return self._take(len(self._held) - keep)

    def end(self) -> str:
        """What was held back and is part of no stop string."""
        return self._take(len(self._held))

    def _take(self, count: int, rest: str | None = None) -> str:
        taken, self._held = self._held[:count], self._held[count:] if rest is None else rest
        return taken


class Detokenizer:
    """Turns one token after another into pieces of text.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._tokens: list[int] = []
        self._context = self._read = 0  # tokens before ``_read`` are text already; decoding needs a few of them

    def add(self, token: int) -> str:
        """The text that this token completes; none where it ends within a character."""
        self._tokens.append(token)
        text = self._rest()
        if text.endswith(UNFINISHED):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return text

    def end(self) -> str:
        """What is left, be it a part of a character."""
        text = self._rest()
        self._context = self._read = len(self._tokens)
        return text

    def _rest(self) -> str:
        before = self._decode(self._tokens[self._context : self._read])
        return self._decode(self._tokens[self._context :])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)
