"""The passages that can be put into a prompt: a data set's own statements, or a file of one passage a line."""

from __future__ import annotations

from pathlib import Path

from llm_at_home.data.handbook import build as handbook
from llm_at_home.data.jsonl import read_bytes, sha256_of
from llm_at_home.errors import Refusal

OWN = {"handbook": handbook.statements}


def load_passages(source: str, path: str | Path | None = None) -> list[str]:
    """The passages in their order, each one line.

    Args:
        source: the data set, which gives its own where it has some (``handbook``: a sentence for each fact).
        path: a UTF-8 file of one passage a line, in place of them; blank lines are passed over.

    Raises:
        Refusal: for a data set without passages and no file, or a file that cannot be read, is no text or is empty.
    """
    if path is None:
        if source not in OWN:
            raise Refusal(f"data={source} brings no passages: give text.context_path=FILE, one passage a line")
        return OWN[source]()
    try:
        lines = read_bytes(path).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise Refusal(f"text.context_path={path} is no UTF-8 text") from None
    passages = [line.strip() for line in lines if line.strip()]
    if not passages:
        raise Refusal(f"text.context_path={path} holds no passage: write one a line")
    return passages


def passages_hash(source: str, path: str | Path | None = None) -> str:
    """The SHA-256 (hex) over the passages of :func:`load_passages`, which says what it refuses."""
    return sha256_of(passage.encode() for passage in load_passages(source, path))
