"""One judge, asked: from the cache where it answered before, from a batch, or now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_at_home.evaluation.judge import expected
from llm_at_home.evaluation.judge.cache import ReplyCache, reply_key
from llm_at_home.evaluation.judge.client import JudgeClient, Reply

SINGLE, PAIRWISE = "single", "pairwise"


class Judge:
    """A judge behind a client, with a memory.

    Args:
        client: that asks it.
        cache: of replies that could be read.
        setup: what beside the prompt can change a reply.
        extra_bodies: further fields for each kind of grading, such as a grammar.
        expects: whether single gradings are expected values (:mod:`.expected`).
    """

    def __init__(
        self,
        client: JudgeClient,
        cache: ReplyCache,
        setup: Mapping[str, Any],
        extra_bodies: Mapping[str, Mapping[str, Any]],
        expects: bool = False,
    ) -> None:
        self.client = client
        self.batched: dict[str, Reply] = {}
        self._cache = cache
        self._setup = setup
        self._extra_bodies = extra_bodies
        self._expects = expects

    def ask(self, kind: str, messages: Sequence[dict[str, str]], repeat: int, again: bool = False) -> Reply:
        """A reply; ``again`` asks anew, for a reply that could not be read.

        Raises:
            JudgeError: as :meth:`JudgeClient.ask`.
        """
        key = self.key(kind, messages, repeat)
        if not again and (known := self._cache.get(key) or self.batched.pop(key, None)):
            return known
        if kind == SINGLE and self._expects:
            options = {"cache_prompt": False, **dict(self._setup.get("extra_body") or {})}
            return expected.rate(self.client, messages, options)
        return self.client.ask(messages, dict(self._extra_bodies[kind]))

    def keep(self, kind: str, messages: Sequence[dict[str, str]], repeat: int, reply: Reply) -> None:
        """Keep a reply that could be read, so that it is never asked for again."""
        if not reply.cached:
            self._cache.put(self.key(kind, messages, repeat), reply)

    def knows(self, kind: str, messages: Sequence[dict[str, str]], repeat: int) -> bool:
        """Whether the reply is kept already."""
        return self._cache.get(self.key(kind, messages, repeat)) is not None

    def request(self, kind: str, messages: Sequence[dict[str, str]]) -> dict[str, Any]:
        """The body of the request, for a batch."""
        return self.client.request(messages, self._extra_bodies[kind])

    def key(self, kind: str, messages: Sequence[dict[str, str]], repeat: int) -> str:
        """The key of a request, in the cache and in a batch."""
        return reply_key({**self._setup, **self._extra_bodies[kind], "kind": kind}, messages, repeat)

    def stop(self) -> None:
        """Allow no further try."""
        self.client.stop()
