"""What single and pairwise grading share: answers, the key of a judgment, and asking for one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from llm_at_home.errors import Refusal
from llm_at_home.evaluation.judge.client import JudgeClient, JudgeRejected
from llm_at_home.evaluation.judge.prompts import MAX_TURNS, Question

T = TypeVar("T")
Row = dict[str, Any]
Messages = list[dict[str, str]]


class Item(Protocol):
    """One judgment to be had."""

    @property
    def key(self) -> Hashable:
        """The key of its row in ``judgments.jsonl``."""

    def judge(self, client: JudgeClient) -> Row:
        """Ask for it; the row may say that it is missing."""

    def lost(self, reason: str) -> Row:
        """A stand-in for the row of a judgment that a later run may still get; it is never written."""


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What came of asking: a value, or the reason why there is none."""

    value: T | None
    text: str
    asked: int
    missing: str | None = None
    served_model: str | None = None


def attempt(
    client: JudgeClient, messages: Messages, parse: Callable[[str], T | None], extra_body: dict[str, Any]
) -> Outcome[T]:
    """Ask, and ask once more in the same words when the reply cannot be read.

    The same words at the same temperature, because another prompt, seed or temperature would be another
    protocol. It helps with hosted models, which are not deterministic at temperature 0.

    Raises:
        JudgeDenied: when the server serves nobody.
        JudgeUnreachable: when it does not answer.
    """
    for asked in (1, 2):
        try:
            reply = client.ask(messages, extra_body)
        except JudgeRejected as error:
            return Outcome(None, "", asked, str(error))
        value = parse(reply.text)
        if value is not None:
            return Outcome(value, reply.text, asked, None, reply.served_model)
    cut = ", which was cut off at max_tokens" if reply.finish_reason == "length" else ""
    return Outcome(None, reply.text, asked, f"no rating in the reply{cut}", reply.served_model)


def judgment_key(row: Row) -> Hashable:
    """The key of a row: question, turn, model or models, judge and, in our own rows, the exact request."""
    models = (row["model"],) if "model" in row else (row["model_1"], row["model_2"])
    return row["question_id"], row["turn"], *models, *row["judge"], row.get("request_hash")


def request_hash(setup: Mapping[str, Any], conversations: Sequence[Messages]) -> str:
    """Sixteen hex digits over all that is sent, so that a changed answer or setting is judged anew."""
    text = json.dumps([setup, conversations], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def answer_turns(answers: Iterable[Row]) -> dict[int, tuple[str, list[str]]]:
    """The model name and the turns of each answer, by question; the first choice counts, as in FastChat.

    Raises:
        Refusal: for a row that is no FastChat answer.
    """
    turns = {}
    for row in answers:
        try:
            turns[row["question_id"]] = (str(row["model_id"]), list(row["choices"][0]["turns"]))
        except (KeyError, IndexError, TypeError) as error:
            raise Refusal(f"question {row.get('question_id')}: no answer in FastChat's format: {error!r}") from None
    return turns


def turns_of(question: Question) -> range:
    """The turns to judge, counted from 1.

    Raises:
        Refusal: when the published templates have no place for that many.
    """
    if len(question.turns) > MAX_TURNS:
        raise Refusal(
            f"question {question.question_id} has {len(question.turns)} turns: "
            f"the judge templates have room for {MAX_TURNS}"
        )
    return range(1, len(question.turns) + 1)
