"""Where conversations come from (handbook, guanaco, the user's own file) and how they are split."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_at_home.data.conversations import Conversation, parse_jsonl
from llm_at_home.data.guanaco import guanaco_name, load_guanaco
from llm_at_home.data.jsonl import BadLine, read_bytes, sha256_of
from llm_at_home.errors import Refusal

SOURCES = ("handbook", "guanaco", "jsonl")
SPLITS = ("train", "test")
SYNTHETIC = "synthetic"  # random ids for a model without a tokenizer, which no file holds
HANDBOOK = Path(__file__).parent / "handbook"


@dataclass(frozen=True)
class Loaded:
    """One split: its conversations, the lines that were left out, and the SHA-256 of what was read."""

    conversations: list[Conversation]
    bad_lines: list[BadLine]
    sha256: str


def load_split(
    source: str,
    split: str,
    *,
    path: str | Path | None = None,
    test_path: str | Path | None = None,
    test_fraction: float = 0.1,
    limit: int | None = None,
    seed: int = 0,
) -> Loaded:
    """The conversations of one split of a source.

    Args:
        source: ``handbook``, ``guanaco`` or ``jsonl``.
        split: ``train`` or ``test``.
        path: the file of ``jsonl``.
        test_path: its test file; without one, ``test_fraction`` of ``path`` is held out.
        test_fraction: the share of distinct conversations held out, at least one; chosen by ``seed`` and
            content, so that copies of a conversation never lie on both sides.
        limit: keep the first N conversations of the split.
        seed: chooses what is held out.

    Raises:
        Refusal: for an unknown source or split, a missing or unusable file, no network.
    """
    check_source(source, path)
    if split not in SPLITS:
        raise Refusal(f"no split {split!r}; choose one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise Refusal(f"limit={limit} leaves no conversation; give at least 1")
    if source == "guanaco":
        conversations, bad = load_guanaco(split)
        sha256 = sha256_of([json.dumps([c.messages for c in conversations]).encode()])
        return Loaded(conversations[:limit], bad, sha256)
    file = _file(source, split, path, test_path)
    content = read_bytes(file)
    conversations, bad = parse_jsonl(content, str(file))
    if source == "jsonl" and test_path is None:
        conversations = _held_out(conversations, split, test_fraction, seed, str(file))
    return Loaded(conversations[:limit], bad, sha256_of([content]))


def load_group(data: Mapping[str, Any], split: str, limit: int | None, seed: int) -> Loaded:
    """One split of what a configuration's ``data`` group names; as :func:`load_split`.

    Args:
        data: with ``source``, ``path``, and where it has one, ``test_path``.
        split: ``train`` or ``test``.
        limit: keep the first N conversations.
        seed: chooses what is held out.
    """
    return load_split(data["source"], split, path=data["path"], test_path=data.get("test_path"), limit=limit, seed=seed)


def check_group(data: Mapping[str, Any], splits: Sequence[str], seed: int) -> None:
    """Refuse a user's own file that gives no conversation to one of the splits; other sources are not read.

    Args:
        data: as :func:`load_group` takes it.
        splits: those that will be read.
        seed: chooses what is held out.

    Raises:
        Refusal: with what is the matter with the file.
    """
    if data["source"] == "jsonl":
        # Of one file that is split both sides have some, or neither.
        for split in splits if data.get("test_path") else splits[:1]:
            load_group(data, split, None, seed)


def data_hash(source: str, *, path: str | Path | None = None, test_path: str | Path | None = None) -> str:
    """The SHA-256 (hex) over the bytes of a source's files, train and test; no heavy import, no network.

    For ``guanaco``, whose files may not be here yet, it is over the name of the data set;
    ``Loaded.sha256`` is over what was read.

    Raises:
        Refusal: for an unknown source, or a file that cannot be read.
    """
    check_source(source, path)
    if source == "guanaco":
        return sha256_of([guanaco_name().encode()])
    files = dict.fromkeys(_file(source, split, path, test_path) for split in SPLITS)
    return sha256_of(read_bytes(file) for file in files)


def check_source(source: str, path: str | Path | None = None) -> None:
    """Refuses an unknown source, and ``jsonl`` without a path; reads nothing."""
    if source not in SOURCES:
        raise Refusal(f"no data source {source!r}; choose one of {', '.join(SOURCES)}")
    if source == "jsonl" and not path:
        raise Refusal('data=jsonl needs a file: data.path=conversations.jsonl (one {"messages": [...]} a line)')


def _file(source: str, split: str, path: str | Path | None, test_path: str | Path | None) -> Path:
    if source == "handbook":
        return HANDBOOK / f"{split}.jsonl"
    assert path is not None, "check_source comes first"
    return Path(test_path if split == "test" and test_path is not None else path).expanduser()


def _held_out(
    conversations: list[Conversation], split: str, fraction: float, seed: int, name: str
) -> list[Conversation]:
    """The conversations on one side of a split that depends on the seed and on what they say alone."""
    if not 0 < fraction < 1:
        raise Refusal(f"data.test_fraction={fraction} is not between 0 and 1; or give data.test_path")

    def key(conversation: Conversation) -> str:
        return hashlib.sha256(json.dumps([seed, conversation.messages]).encode()).hexdigest()

    keys = sorted({key(c) for c in conversations})
    if len(keys) < 2:
        raise Refusal(f"{name} holds one conversation, none can be held out; add more or give data.test_path")
    test = set(keys[: min(math.ceil(fraction * len(keys)), len(keys) - 1)])
    return [c for c in conversations if (key(c) in test) == (split == "test")]
