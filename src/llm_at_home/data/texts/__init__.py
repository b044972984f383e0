"""Original English passages of many registers, for measuring and for calibrating quantized models.

``held_out`` is what perplexity and KL divergence are measured on; ``calibration`` is what a quantizer may look at.
The two share no topic and no sentence. All of it was written for this project.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_at_home.data.jsonl import BadLine, parse_lines, read_bytes, sha256_of, summary, text_fault
from llm_at_home.errors import Refusal

HERE = Path(__file__).parent
NAMES = ("held_out", "calibration")


def texts_file(name: str) -> Path:
    """The file that holds the passages called ``name``.

    Raises:
        Refusal: for any other name than those in ``NAMES``.
    """
    if name not in NAMES:
        raise Refusal(f"no texts {name!r}; choose one of {', '.join(NAMES)}")
    return HERE / f"{name}.jsonl"


def load_texts(name: str, limit: int | None = None) -> list[str]:
    """The passages called ``name`` in the file's order: all of them, or the first ``limit``.

    A limit above their number gives all of them.

    Raises:
        Refusal: for an unknown name, a limit below 1, or a damaged file.
    """
    path = texts_file(name)
    if limit is not None and limit < 1:
        raise Refusal(f"the number of texts must be at least 1, not {limit}")
    texts: list[str] = []
    bad: list[BadLine] = []
    for number, row, fault in parse_lines(read_bytes(path)):
        text: Any = row.get("text") if isinstance(row, dict) else None
        if fault is None and (what := text_fault(text)) is not None:
            fault = f"its text {what}"
        if fault is not None:
            bad.append(BadLine(number, fault))
        else:
            texts.append(text)
    if bad:
        raise Refusal(f"{path}: {summary(bad)}")
    return texts[:limit]


def texts_hash(name: str) -> str:
    """SHA-256 (hex) of the file that holds the passages called ``name``.

    Raises:
        Refusal: for an unknown name.
    """
    return sha256_of([read_bytes(texts_file(name))])
