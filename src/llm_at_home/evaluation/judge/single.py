"""Single-answer grading: 1 to 10 points for each question and turn."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llm_at_home.evaluation.judge.asking import SINGLE, Judge
from llm_at_home.evaluation.judge.items import (
    Messages,
    Row,
    answer_samples,
    attempt,
    judgment_key,
    request_hash,
    turns_of,
)
from llm_at_home.evaluation.judge.prompts import Question, Templates, references
from llm_at_home.evaluation.judge.ratings import parse_rating

MISSING_SCORE = -1  # FastChat's sign for "no score"; its scripts leave such rows out of every mean.


@dataclass(frozen=True)
class SingleItem:
    """One answer to be graded."""

    head: Row
    messages: Messages

    @property
    def key(self) -> Hashable:
        """The key of its row in ``judgments.jsonl``."""
        return judgment_key(self.head)

    @property
    def requests(self) -> list[tuple[str, Messages, int]]:
        """What is asked for it."""
        return [(SINGLE, self.messages, self.head["repeat"])]

    def judge(self, judge: Judge) -> Row:
        """Grade it; FastChat's fields first, then ours."""
        outcome = attempt(judge, SINGLE, self.messages, self.head["repeat"], parse_rating)
        shares = {"probabilities": list(outcome.probabilities)} if outcome.probabilities else {}
        return {
            **self.head,
            "user_prompt": self.messages[-1]["content"],
            "judgment": outcome.text,
            "score": MISSING_SCORE if outcome.value is None else _plain(outcome.value),
            "tstamp": time.time(),
            "missing": outcome.missing,
            "asked": outcome.asked,
            "served_model": outcome.served_model,
            **shares,
        }

    def lost(self, reason: str) -> Row:
        """A stand-in for the row of a judgment that a later run may still get."""
        return {**self.head, "score": MISSING_SCORE, "missing": reason}


def single_items(
    questions: Iterable[Question],
    answers: Iterable[Row],
    templates: Templates,
    setup: Mapping[str, Any],
    repeats: int = 1,
) -> tuple[list[SingleItem], int]:
    """The judgments that a set of answers calls for, and how many turns have no answer.

    Args:
        questions: with one or two turns each.
        answers: FastChat's rows; each of their choices is graded.
        templates: the judge templates.
        setup: what else is sent (model, temperature, ...); ``setup["model"]`` names the judge.
        repeats: judgments of each answer, which tell the judge's own noise.
    """
    given = answer_samples(answers)
    items: list[SingleItem] = []
    unanswered = 0
    for question in questions:
        model, samples = given.get(question.question_id, ("", [[]]))
        for turn in turns_of(question):
            for sample, replies in enumerate(samples):
                if len(replies) < turn:
                    unanswered += 1
                    continue
                known = references(question, turn)
                template = templates.pick("single", turn, referenced=known is not None)
                messages = template.messages(**_values(question, replies, turn), **(known or {}))
                head = {
                    "question_id": question.question_id,
                    "model": model,
                    "judge": [setup["model"], template.name],
                    "turn": turn,
                    "category": question.category,
                    "sample": sample,
                    "request_hash": request_hash(setup, [messages]),
                }
                items += [SingleItem({**head, "repeat": repeat}, messages) for repeat in range(repeats)]
    return items, unanswered


def _values(question: Question, replies: list[str], turn: int) -> dict[str, str]:
    if turn == 1:
        return {"question": question.turns[0], "answer": replies[0]}
    return {
        "question_1": question.turns[0],
        "question_2": question.turns[1],
        "answer_1": replies[0],
        "answer_2": replies[1],
    }


def _plain(score: float) -> float:
    return int(score) if score.is_integer() else score
