"""The token sequences that fidelity is measured on, and which of their tokens count."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Passage:
    """Token ids; those from index ``first`` on are predicted and count, those before are given."""

    ids: list[int]
    first: int = 1

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        return len(self.ids) - self.first


def held_out(tokenizer: Any, limit: int | None, max_length: int) -> list[Passage]:
    """The shipped held-out texts, each cut at ``max_length`` tokens."""
    from llm_at_home.data.texts import load_texts

    return [Passage(tokenizer(text)["input_ids"][:max_length]) for text in load_texts("held_out", limit)]


def first_turns(tokenizer: Any, limit: int | None) -> list[list[int]]:
    """The prompts of home_bench's first turns, in the model's chat template."""
    from llm_at_home.data.questions import load_questions
    from llm_at_home.models.chat import prompt_ids

    questions = load_questions("home_bench", limit=limit)
    return [prompt_ids(tokenizer, [{"role": "user", "content": question.turns[0]}]) for question in questions]


def passages_hash(passages: Sequence[Passage]) -> str:
    """Sixteen hexadecimal digits over token ids and which of them count: the tokenizer and template are in it too."""
    text = json.dumps([[passage.first, passage.ids] for passage in passages])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
