"""What a conversation is, and how a file of them (OpenAI's ``messages`` format) is checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_at_home.data.jsonl import BadLine, parse_lines, read_bytes, summary, text_fault
from llm_at_home.errors import Refusal

Message = dict[str, str]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Conversation:
    """Messages (``role``, ``content``) that end with the assistant's: an optional system message, then turns.

    ``kind`` groups conversations for the metrics (``fact``, ``refusal``, ``dialogue``; else ``chat``).
    ``fact`` and ``template`` name what is asked and the sentence that words it, where a data set knows.
    """

    id: str
    messages: list[Message]
    kind: str = "chat"
    fact: str | None = None
    template: str | None = None


def messages_fault(messages: object) -> str | None:
    """Why a value is no list of messages to train on, in a few words; None when it is one."""
    if not isinstance(messages, list):
        return "messages is no list"
    if not messages:
        return "messages is empty"
    for place, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            return f"message {place} is no object"
        if message.get("role") not in ROLES:
            return f"message {place} has the unknown role {message.get('role')!r}; known: {', '.join(ROLES)}"
        if fault := text_fault(message.get("content")):
            return f"the content of message {place} {fault}"
    return order_fault([message["role"] for message in messages])


def order_fault(roles: list[str]) -> str | None:
    """Why roles in this order make no conversation; None when they do."""
    if "system" in roles[1:]:
        return f"message {roles.index('system', 1) + 1} is a system message; only the first may be"
    turns = roles[1:] if roles[0] == "system" else roles
    if "assistant" not in turns:
        return "no message is from the assistant"
    offset = len(roles) - len(turns) + 1
    for place, role in enumerate(turns):
        expected = ("user", "assistant")[place % 2]
        if role != expected:
            return f"message {place + offset} is the {role}'s and should be the {expected}'s; roles alternate"
    if turns[-1] != "assistant":
        return "the last message is not from the assistant"
    return None


def conversation_fault(row: object) -> str | None:
    """Why a JSON value is no conversation; None when it is one."""
    if isinstance(row, list):
        return "a JSON array; write one object with messages per line"
    if not isinstance(row, dict):
        return "no JSON object"
    if "messages" not in row:
        return "no messages"
    for key in ("kind", "fact", "template"):
        if row.get(key) is not None and not isinstance(row[key], str):
            return f"{key} is no string"
    if not isinstance(row.get("id", ""), str | int):
        return "id is neither a string nor a number"
    return messages_fault(row["messages"])


def to_conversation(row: dict[str, Any], default_id: str) -> Conversation:
    """The conversation in a checked row; further keys of the row and of its messages are left out."""
    return Conversation(
        id=str(row.get("id", default_id)),
        messages=[{"role": m["role"], "content": m["content"]} for m in row["messages"]],
        kind=row.get("kind") or "chat",
        fact=row.get("fact"),
        template=row.get("template"),
    )


def parse_jsonl(content: bytes, name: str) -> tuple[list[Conversation], list[BadLine]]:
    """The conversations in the bytes of a JSONL file called ``name``; see :func:`read_jsonl`."""
    conversations: list[Conversation] = []
    bad: list[BadLine] = []
    first_line: dict[str, int] = {}
    for number, row, reason in parse_lines(content):
        reason = reason or conversation_fault(row)
        if reason is None:
            conversation = to_conversation(row, f"{Path(name).stem}-{number}")
            seen = first_line.setdefault(conversation.id, number)
            if seen == number:
                conversations.append(conversation)
                continue
            reason = f"the id {conversation.id!r} is that of line {seen}"
        bad.append(BadLine(number, reason))
    if not conversations:
        why = summary(bad) if bad else "it is empty"
        raise Refusal(f"{name} holds no usable conversation: {why}")
    return conversations, bad


def read_jsonl(path: str | Path) -> tuple[list[Conversation], list[BadLine]]:
    """The conversations of a file with one ``{"messages": [...]}`` a line, and the lines that are none.

    A byte order mark, Windows line ends and blank lines are fine. ``id``, ``kind``, ``fact`` and ``template``
    are read where a line has them; without an ``id`` a conversation is called by the file and its line.

    Raises:
        Refusal: when the file cannot be read or no line of it can be used.
    """
    return parse_jsonl(read_bytes(path), str(path))
