"""The text that a quantizer or pruner may look at, and the refusal to look at what is evaluated afterwards."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llm_at_home.errors import Refusal

SHIPPED = "texts"
# Brown et al. 2020 (GPT-3, appendix C) call two texts overlapping when they share thirteen words in a row.
SHARED_WORDS = 13


def calibration_texts(options: Mapping[str, Any], seed: int = 0) -> list[str]:
    """The calibration texts that ``quant.calibration`` or ``prune.calibration`` names.

    Args:
        options: ``source`` is ``texts`` (48 passages that ship with the package) or a data set (``handbook``,
            ``guanaco``, ``jsonl`` with ``path``), whose train split is taken; ``limit`` the first so many.
        seed: of the data set's split.

    Raises:
        Refusal: for a source that does not exist or a file that cannot be read.
    """
    if options["source"] == SHIPPED:
        from llm_at_home.data.texts import load_texts

        return load_texts("calibration", options["limit"])
    from llm_at_home.data.sources import load_group

    loaded = load_group(options, "train", options["limit"], seed)
    return ["\n".join(message["content"] for message in c.messages) for c in loaded.conversations]


def calibration_hash(texts: Sequence[str]) -> str:
    """SHA-256 (hex) of the texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def evaluated_texts(config: Mapping[str, Any]) -> list[str]:
    """Everything that a resolved configuration is going to measure the model on; empty where it measures none.

    Questions count, and references where a figure is computed from them.
    """
    from llm_at_home.data.questions import load_questions

    found: list[str] = []
    questions = config.get("questions")
    if questions and questions["source"] != "synthetic":
        asked = load_questions(questions["source"], path=questions["path"], ids=questions["ids"])
        found += [turn for question in asked for turn in question.turns]
    if config.get("task") in ("text", "fidelity"):
        found += [turn for q in load_questions("home_bench") for turn in (*q.turns, *(q.reference or ()))]
    if config.get("task") == "fidelity":
        from llm_at_home.data.texts import load_texts

        found += load_texts("held_out")
    if config.get("task") == "text":
        from llm_at_home.data.sources import load_group

        split = load_group(config["data"], "test", config["limit"], config["seed"])
        found += [message["content"] for c in split.conversations for message in c.messages[-2:]]
    return found


def refuse_overlap(options: Mapping[str, Any], config: Mapping[str, Any], group: str = "quant") -> None:
    """Refuse calibration on text that is measured on: the figure would flatter the method.

    Args:
        options: the calibration.
        config: resolved.
        group: whose calibration it is, for the message.

    Raises:
        Refusal: quoting the first thirteen words that both have.
    """
    shared = shared_words(calibration_texts(options, config["seed"]), evaluated_texts(config))
    if shared:
        hint = f"use {group}.calibration.source=texts"
        raise Refusal(f'calibration text is also evaluated ("{shared}"): {hint}, or evaluate on something else')


def shared_words(calibration: Sequence[str], evaluated: Sequence[str]) -> str | None:
    """The first thirteen words in a row that two collections share, or None; shorter texts count whole."""
    seen = {words for text in calibration for words in _runs(text)}
    return next((" ".join(words) for text in evaluated for words in _runs(text) if words in seen), None)


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    if 0 < len(words) < SHARED_WORDS:
        yield tuple(words)
    for start in range(len(words) - SHARED_WORDS + 1):
        yield tuple(words[start : start + SHARED_WORDS])
