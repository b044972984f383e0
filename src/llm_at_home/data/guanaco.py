"""The paper's fine-tuning data: OpenAssistant-Guanaco, from the hub (Dettmers et al. 2023, QLoRA)."""

from __future__ import annotations

import re

from llm_at_home.data.conversations import Conversation, Message, messages_fault
from llm_at_home.data.jsonl import BadLine
from llm_at_home.errors import Refusal

HUB_ID = "timdettmers/openassistant-guanaco"
_MARK = re.compile(r"### (Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def guanaco_name() -> str:
    """The name that stands for the data set where its files are not read."""
    return f"hub:{HUB_ID}"


def parse_turns(text: str) -> list[Message]:
    """The messages in ``### Human: ...### Assistant: ...``; a last word without an answer is left out."""
    parts = _MARK.split(text)
    turns = [
        {"role": _ROLES[mark], "content": content.strip()}
        for mark, content in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return turns[:-1] if turns and turns[-1]["role"] == "user" else turns


def load_guanaco(split: str) -> tuple[list[Conversation], list[BadLine]]:
    """The conversations of one split (``train`` or ``test``), and the rows, from 1, that hold none.

    Raises:
        Refusal: when the hub cannot be reached and the data set is not in its cache.
    """
    import datasets

    try:
        rows = datasets.load_dataset(HUB_ID, split=split)
    except Exception as error:
        # The hub's client raises many kinds (connection, offline mode, missing file); all mean the same.
        raise Refusal(
            f"data=guanaco could not be loaded ({type(error).__name__}): "
            f"go online once so that {HUB_ID} is cached, or use data=handbook or data=jsonl"
        ) from error
    conversations: list[Conversation] = []
    bad: list[BadLine] = []
    for number, row in enumerate(rows, start=1):
        messages = parse_turns(row["text"])
        if fault := messages_fault(messages):
            bad.append(BadLine(number, fault))
        else:
            conversations.append(Conversation(f"guanaco-{split}-{number}", messages))
    return conversations, bad
