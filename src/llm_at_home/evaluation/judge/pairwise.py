"""Pairwise grading against a baseline, in both orders: a judge that favours a position decides nothing."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from llm_at_home.evaluation.judge.asking import PAIRWISE, Judge
from llm_at_home.evaluation.judge.items import (
    Messages,
    Outcome,
    Row,
    answer_samples,
    attempt,
    judgment_key,
    request_hash,
    turns_of,
)
from llm_at_home.evaluation.judge.prompts import Question, Templates, references
from llm_at_home.evaluation.judge.ratings import Verdict, parse_verdict

ERROR = "error"  # FastChat's winner when there is no verdict; its scripts leave such rows out.

_FIRST_ORDER = {"A": "model_1", "B": "model_2", "tie": "tie"}
_SECOND_ORDER = {"A": "model_2", "B": "model_1", "tie": "tie"}


@dataclass(frozen=True)
class PairItem:
    """Two answers to be compared, model_1 first as assistant A and then as assistant B."""

    head: Row
    orders: tuple[Messages, Messages]

    @property
    def key(self) -> Hashable:
        """The key of its row in ``judgments.jsonl``."""
        return judgment_key(self.head)

    @property
    def requests(self) -> list[tuple[str, Messages, int]]:
        """What is asked for it."""
        return [(PAIRWISE, order, self.head["repeat"]) for order in self.orders]

    def judge(self, judge: Judge) -> Row:
        """Compare them in both orders; FastChat's fields first, then ours."""
        outcomes: list[Outcome[Verdict]] = [attempt(judge, *request, parse_verdict) for request in self.requests]
        first, second = outcomes
        return {
            **self.head,
            "g1_winner": _winner(first, _FIRST_ORDER),
            "g2_winner": _winner(second, _SECOND_ORDER),
            "g1_user_prompt": self.orders[0][-1]["content"],
            "g1_judgment": first.text,
            "g2_user_prompt": self.orders[1][-1]["content"],
            "g2_judgment": second.text,
            "tstamp": time.time(),
            "missing": first.missing or second.missing,
            "asked": first.asked + second.asked,
            "served_model": first.served_model or second.served_model,
        }

    def lost(self, reason: str) -> Row:
        """A stand-in for the row of a judgment that a later run may still get."""
        return {**self.head, "g1_winner": ERROR, "g2_winner": ERROR, "missing": reason}


def pair_items(
    questions: Iterable[Question],
    answers: Iterable[Row],
    baseline_answers: Iterable[Row],
    templates: Templates,
    setup: Mapping[str, Any],
    repeats: int = 1,
) -> tuple[list[PairItem], int]:
    """The comparisons that two sets of answers call for, and how many turns lack an answer on either side.

    Arguments as for :func:`~llm_at_home.evaluation.judge.single.single_items`; ``model_1`` is the model of
    ``answers``, ``model_2`` the baseline's. A sample is compared with the other side's of the same number; one without
    a counterpart counts as a lack.
    """
    ours, theirs = answer_samples(answers), answer_samples(baseline_answers)
    items: list[PairItem] = []
    unanswered = 0
    for question in questions:
        model_1, samples_1 = ours.get(question.question_id, ("", [[]]))
        model_2, samples_2 = theirs.get(question.question_id, ("", [[]]))
        for turn in turns_of(question):
            nothing: list[str] = []
            for sample, (one, two) in enumerate(zip_longest(samples_1, samples_2, fillvalue=nothing)):
                if min(len(one), len(two)) < turn:
                    unanswered += 1
                    continue
                known = references(question, turn)
                template = templates.pick("pairwise", turn, referenced=known is not None)
                orders = (
                    template.messages(**_values(question, one, two, turn), **(known or {})),
                    template.messages(**_values(question, two, one, turn), **(known or {})),
                )
                head = {
                    "question_id": question.question_id,
                    "model_1": model_1,
                    "model_2": model_2,
                    "judge": [setup["model"], template.name],
                    "turn": turn,
                    "category": question.category,
                    "sample": sample,
                    "request_hash": request_hash(setup, orders),
                    "lengths": [len(one[turn - 1]), len(two[turn - 1])],
                }
                items += [PairItem({**head, "repeat": repeat}, orders) for repeat in range(repeats)]
    return items, unanswered


def points(row: Row) -> float | None:
    """What model_1 gets for a comparison: win 1, tie 0.5, loss 0, None without a verdict in both orders.

    Orders that disagree are a tie, as in FastChat and in the paper.
    """
    first, second = row["g1_winner"], row["g2_winner"]
    if ERROR in (first, second):
        return None
    if first != second or first == "tie":
        return 0.5
    return 1.0 if first == "model_1" else 0.0


def inconsistent(row: Row) -> bool:
    """Whether both orders gave a verdict, and not the same one."""
    return ERROR not in (row["g1_winner"], row["g2_winner"]) and row["g1_winner"] != row["g2_winner"]


def _winner(outcome: Outcome[Verdict], names: dict[str, str]) -> str:
    return ERROR if outcome.value is None else names[outcome.value]


def _values(question: Question, a: list[str], b: list[str], turn: int) -> dict[str, str]:
    if turn == 1:
        return {"question": question.turns[0], "answer_a": a[0], "answer_b": b[0]}
    return {
        "question_1": question.turns[0],
        "question_2": question.turns[1],
        "answer_a_1": a[0],
        "answer_a_2": a[1],
        "answer_b_1": b[0],
        "answer_b_2": b[1],
    }
