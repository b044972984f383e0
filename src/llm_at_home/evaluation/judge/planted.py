"""Answers whose order is known beforehand: a reference, and what was done to it. They test the judge, not a model."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.evaluation.judge.prompts import Question

CORRUPTED, TRUNCATED, OFF_TOPIC, PADDED = "corrupted", "truncated", "off_topic", "padded"
#: Worse than the reference beyond doubt; padding is not, but no better either.
WORSE = (CORRUPTED, TRUNCATED, OFF_TOPIC)
KINDS = (*WORSE, PADDED)
REFERENCE = "reference"

Row = dict[str, Any]


def planted_sets(questions: Sequence[Question], seed: int = 0) -> dict[str, list[Row]]:
    """FastChat answer rows of the references and of each kind of damage, to the first turns.

    - corrupted: every number is another one; an answer without numbers has its words shuffled;
    - truncated: the first third of its words;
    - off_topic: the reference of a question of another category;
    - padded: the same said three times over (the attack of Zheng et al. 2023, section 3.3, on a whole answer).

    Args:
        questions: those without a reference for the first turn are left out, and so are references of under six words,
            which leave nothing to cut off.
        seed: of shuffling and of the numbers.

    Raises:
        Refusal: when fewer than two questions of different categories are left.
    """
    known = [(q, q.reference[0]) for q in questions if q.reference and len(q.reference[0].split()) >= 6]
    if len({question.category for question, _ in known}) < 2:
        raise Refusal(
            "planted pairs are made of reference answers to questions of two categories or more, and these have "
            "none: use questions=home_bench or questions=mt_bench"
        )
    sets: dict[str, list[Row]] = {REFERENCE: [], **{kind: [] for kind in KINDS}}
    for place, (question, reference) in enumerate(known):
        draw = random.Random(f"{seed}/{question.question_id}")
        others = [text for other, text in known[place + 1 :] + known[:place] if other.category != question.category]
        texts = {
            REFERENCE: reference,
            CORRUPTED: corrupted(reference, draw),
            TRUNCATED: " ".join(reference.split()[: max(1, len(reference.split()) // 3)]),
            OFF_TOPIC: others[0],
            PADDED: f"{reference}\n\nIn other words: {reference}\n\nTo say it once more: {reference}",
        }
        for kind, text in texts.items():
            sets[kind].append(answer_row(question.question_id, kind, [text]))
    return sets


def corrupted(text: str, draw: random.Random) -> str:
    """The text with every number changed, or its words shuffled where it has none."""
    if re.search(r"\d", text):
        return re.sub(r"\d+", lambda found: str(int(found[0]) + draw.randint(1, 9)), text)
    words = text.split()
    draw.shuffle(words)
    return " ".join(words)


def answer_row(question_id: int, model_id: str, turns: list[str]) -> Row:
    """An answer in FastChat's fields."""
    return {"question_id": question_id, "model_id": model_id, "choices": [{"index": 0, "turns": turns}]}
