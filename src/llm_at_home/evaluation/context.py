"""Passages in the prompt: which ones a question gets, and where they stand.

They stand in the system message and not before the question: every question then begins alike, so that a server that
keeps the keys and values of a shared prefix pays for it once, and the turns of a dialogue stay as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_at_home.data.passages import load_passages
from llm_at_home.errors import Refusal

NONE, ALL, RETRIEVED = "none", "all", "retrieved"
CHOICES = (NONE, ALL, RETRIEVED)
Message = dict[str, str]


def check(config: Mapping[str, Any]) -> None:
    """Refuse what ``text.context`` cannot do.

    Args:
        config: a resolved configuration with ``task=text``.

    Raises:
        Refusal: for an unknown choice, passages that are not there, or fewer than one to retrieve.
    """
    options = config["text"]
    if options["context"] not in CHOICES:
        raise Refusal(f"text.context={options['context']} is unknown: choose one of {', '.join(CHOICES)}")
    if options["context"] == NONE:
        if options["context_path"]:
            raise Refusal("text.context_path needs text.context=all or retrieved: with none no passage is read")
        return
    if options["retrieved"] < 1:
        raise Refusal(f"text.retrieved={options['retrieved']} is too small: give at least 1, or text.context=none")
    load_passages(config["data"]["source"], options["context_path"])


class Context:
    """Gives each conversation its passages.

    Args:
        options: the ``text`` group of a configuration.
        source: the data set.
    """

    def __init__(self, options: Mapping[str, Any], source: str) -> None:
        self._instruction: str | None = options["instruction"]
        self._count: int = options["retrieved"]
        self._passages = load_passages(source, options["context_path"]) if options["context"] != NONE else []
        self._index = None
        if options["context"] == RETRIEVED:
            from llm_at_home.evaluation.retrieval import BM25

            self._index = BM25(self._passages)

    def passages(self, messages: Sequence[Message]) -> list[str]:
        """What the system message of this conversation holds.

        Retrieval searches for all that the user said, since a follow-up ("what does it cost?") names nothing itself.
        """
        if self._index is None:
            return self._passages
        query = "\n".join(message["content"] for message in messages if message["role"] == "user")
        return [self._passages[place] for place in self._index.best(query, self._count)]

    def prompted(self, messages: Sequence[Message], passages: Sequence[str]) -> list[Message]:
        """The conversation with instruction and passages in its system message, which is made where there is none."""
        if not passages and not self._instruction:
            return list(messages)
        system, turns = [], list(messages)
        if turns[0]["role"] == "system":
            system.append(turns.pop(0)["content"])
        if self._instruction:
            system.append(self._instruction)
        text = "\n\n".join(filter(None, [" ".join(system), "\n".join(passages)]))
        return [{"role": "system", "content": text}, *turns]
