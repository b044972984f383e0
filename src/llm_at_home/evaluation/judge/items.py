"""What single and pairwise grading share: answers, the key of a judgment, and asking for one."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from llm_at_home.errors import Refusal
from llm_at_home.evaluation.judge.asking import Judge
from llm_at_home.evaluation.judge.client import JudgeRejected
from llm_at_home.evaluation.judge.prompts import MAX_TURNS, Question

T = TypeVar("T")
Row = dict[str, Any]
Messages = list[dict[str, str]]


class Item(Protocol):
    """One judgment to be had."""

    @property
    def key(self) -> Hashable:
        """The key of its row in ``judgments.jsonl``."""

    @property
    def requests(self) -> list[tuple[str, Messages, int]]:
        """What is asked for it: the kind of grading, the conversation, and which repeat it is."""

    def judge(self, judge: Judge) -> Row:
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
    probabilities: tuple[float, ...] | None = None


def attempt(judge: Judge, kind: str, messages: Messages, repeat: int, parse: Callable[[str], T | None]) -> Outcome[T]:
    """Ask, and ask once more in the same words when the reply cannot be read.

    The same words at the same temperature, because another prompt, seed or temperature would be another
    protocol. It helps with hosted models, which are not deterministic at temperature 0. ``asked`` is 0 for a reply
    that was kept from before.

    Raises:
        JudgeDenied: when the server serves nobody.
        JudgeUnreachable: when it does not answer.
        JudgeOverBudget: when it could cost too much.
    """
    for asked in (1, 2):
        try:
            reply = judge.ask(kind, messages, repeat, again=asked > 1)
        except JudgeRejected as error:
            return Outcome(None, "", asked, str(error))
        value = parse(reply.text)
        if value is not None:
            judge.keep(kind, messages, repeat, reply)
            times = 0 if reply.cached else asked
            return Outcome(value, reply.text, times, None, reply.served_model, reply.probabilities)
    cut = ", which was cut off at max_tokens" if reply.finish_reason == "length" else ""
    return Outcome(None, reply.text, asked, f"no rating in the reply{cut}", reply.served_model)


def judgment_key(row: Row) -> Hashable:
    """The key of a row: question, turn, model or models, judge and, in our own rows, the exact request."""
    models = (row["model"],) if "model" in row else (row["model_1"], row["model_2"])
    which = row.get("sample", 0), row.get("repeat", 0)
    return row["question_id"], row["turn"], *models, *row["judge"], row.get("request_hash"), *which


def request_hash(setup: Mapping[str, Any], conversations: Sequence[Messages]) -> str:
    """Sixteen hex digits over all that is sent, so that a changed answer or setting is judged anew."""
    text = json.dumps([setup, conversations], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def answer_samples(answers: Iterable[Row]) -> dict[int, tuple[str, list[list[str]]]]:
    """The model name and each choice's turns, by question. FastChat's own judge reads the first choice only.

    Raises:
        Refusal: for a row that is no FastChat answer.
    """
    turns = {}
    for row in answers:
        try:
            samples = [[str(text) for text in choice["turns"]] for choice in row["choices"]]
            turns[row["question_id"]] = (str(row["model_id"]), [samples[0], *samples[1:]])
        except (KeyError, IndexError, TypeError) as error:
            raise Refusal(f"question {row.get('question_id')}: no answer in FastChat's format: {error!r}") from None
    return turns


def distinctly_named(sets: Sequence[list[Row]]) -> list[list[Row]]:
    """The same answers, a model's second and later sets renamed to ``NAME#2`` and so on: two seeds of it, say."""
    seen: Counter[str] = Counter()
    named = []
    for rows in sets:
        name = str(rows[0].get("model_id")) if rows else ""
        seen[name] += 1
        suffix = f"#{seen[name]}" if seen[name] > 1 else ""
        named.append([{**row, "model_id": f"{row['model_id']}{suffix}"} for row in rows] if suffix else rows)
    return named


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
