"""How a JSONL file is read: line by line, each bad line with its number and the reason."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_at_home.errors import Refusal


@dataclass(frozen=True)
class BadLine:
    """A line that could not be used; ``number`` counts from 1."""

    number: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.number}: {self.reason}"


def read_bytes(path: str | Path) -> bytes:
    """The content of a file.

    Raises:
        Refusal: when it is missing, a folder, or not to be read.
    """
    path = Path(path).expanduser()
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Refusal(f"{path} does not exist") from None
    except IsADirectoryError:
        raise Refusal(f"{path} is a folder; name the .jsonl file in it") from None
    except OSError as error:
        raise Refusal(f"{path} cannot be read: {error.strerror or error}") from None


def parse_lines(content: bytes) -> Iterator[tuple[int, Any, str | None]]:
    """Line number, JSON value, and the reason why there is none (else None); blank lines are passed over."""
    # Only \n ends a line: str.splitlines would also cut at U+2028, which JSON allows inside a string.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8")), None
        except UnicodeDecodeError:
            yield number, None, "not UTF-8 text"
        except RecursionError:
            yield number, None, "not JSON (nested too deeply)"
        except ValueError as error:
            yield number, None, f"not JSON ({error})"


def text_fault(text: object) -> str | None:
    """What is wrong with a value that should be a text to read, or None."""
    if not isinstance(text, str):
        return "is no string"
    if not text.strip():
        return "is empty"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # "\ud800" is valid JSON, and no tokenizer takes it.
        return "holds half a surrogate pair"
    return None


def summary(bad: list[BadLine], shown: int = 3) -> str:
    """The first bad lines and the number of the others, in one line."""
    more = f"; and {len(bad) - shown} more" if len(bad) > shown else ""
    return "; ".join(map(str, bad[:shown])) + more


def sha256_of(contents: Iterable[bytes]) -> str:
    """One SHA-256 (hex) over several contents, each set off from the next by its length."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()
