"""Replies that were paid for once: by judge, parameters and prompt, in one sqlite file below the cache folder."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_at_home.evaluation.judge.client import Reply

_SCHEMA = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL, made REAL NOT NULL)"


class ReplyCache:
    """Replies by key. Several processes may share the file; a reply is on disk when :meth:`put` returns.

    Args:
        path: the file; None keeps replies for this run alone.
    """

    def __init__(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._guard = threading.Lock()
        self._database = sqlite3.connect(path or ":memory:", timeout=30, check_same_thread=False)
        with self._guard, self._database:
            self._database.execute(_SCHEMA)

    def get(self, key: str) -> Reply | None:
        """The reply kept under this key, marked as cached."""
        with self._guard:
            found = self._database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        if found is None:
            return None
        kept = json.loads(found[0])
        probabilities = kept.get("probabilities")
        return Reply(
            kept["text"],
            kept["finish_reason"],
            kept["served_model"],
            tuple(probabilities) if probabilities else None,
            cached=True,
        )

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply; an older one under the same key stays."""
        text = json.dumps(
            {
                "text": reply.text,
                "finish_reason": reply.finish_reason,
                "served_model": reply.served_model,
                "probabilities": reply.probabilities,
            }
        )
        with self._guard, self._database:
            self._database.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", (key, text, time.time()))

    def close(self) -> None:
        """Let go of the file."""
        with self._guard:
            self._database.close()


def cache_path() -> Path:
    """Where replies are kept on this machine."""
    from llm_at_home.paths import cache_dir

    return cache_dir() / "judgments" / "replies.sqlite"


def reply_key(setup: Mapping[str, Any], messages: Sequence[Mapping[str, str]], repeat: int) -> str:
    """The key of a request: all that can change its reply, and which repeat of it this is."""
    text = json.dumps([dict(setup), list(messages), repeat], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
