"""The MT-bench judge: a language model grades answers, alone (1 to 10) or against a baseline's.

The protocol, templates and file format are those of Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench
and Chatbot Arena", and of their FastChat ``llm_judge``; where this differs, the function says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llm_at_home.evaluation.judge.settings import MODES, check

if TYPE_CHECKING:
    from llm_at_home.evaluation.judge.grading import Estimate
    from llm_at_home.evaluation.judge.items import Item
    from llm_at_home.evaluation.judge.prompts import Question
    from llm_at_home.records.schema import Reading

__all__ = ["MODES", "Judged", "check", "estimate_run", "judge_run"]

_Row = dict[str, Any]


class Judged(NamedTuple):
    """What a run of the judge gives its record."""

    quality: dict[str, Reading]
    counts: dict[str, int]
    costs: dict[str, Reading]


def judge_run(
    config: Mapping[str, Any],
    questions: Iterable[Question],
    answers: Iterable[_Row],
    baseline_answers: Iterable[_Row] | None,
    folder: Path,
    others: Sequence[Iterable[_Row]] = (),
) -> Judged:
    """Judge a run's answers; judgments already in ``folder`` are kept and not asked for again.

    Args:
        config: the group ``judge`` as plain values.
        questions: with one or two turns each.
        answers: FastChat's answer rows of the run that is judged.
        baseline_answers: those of the run to compare with, for ``mode`` pairwise and both.
        folder: where ``judgments.jsonl`` lies or is made.
        others: further runs' answers, for ``mode`` all_pairs.

    Returns:
        Readings ``judge_score_*`` in points and ``win_rate*`` from 0 to 1, counts, and ``judge_cost``. ``judgments``
        and ``judgments_missing`` are about the whole file, ``judge_*`` about what this run asked; on a resumed
        run the latter can be 0. ``answers_missing`` counts turns that no answer could be found for.

    Raises:
        Refusal: for what :func:`check` finds, answers in another format, or prompts dearer than the budget.
        JudgeError: when the judge denies access, is down or over its budget; what was judged before is kept.
    """
    from llm_at_home.evaluation.judge import settings
    from llm_at_home.evaluation.judge.grading import grade
    from llm_at_home.evaluation.judge.summary import (
        all_pairs_readings,
        outcomes,
        pair_readings,
        single_readings,
        tally,
    )

    items, unanswered = _items(config, questions, answers, baseline_answers, others)
    graded = grade(config, items, folder)
    label, mode = settings.label(config), config["mode"]
    single_rows = [row for row in graded.rows if "model" in row]
    pair_rows = [row for row in graded.rows if "model" not in row]
    quality: dict[str, Reading] = {}
    if mode in ("single", "both"):
        quality |= single_readings(single_rows, label)
    if mode in ("pairwise", "both"):
        quality |= pair_readings(pair_rows, label)
    if mode == "all_pairs":
        quality |= all_pairs_readings(pair_rows, label)
    counts = {**tally(single_rows, pair_rows), "answers_missing": unanswered, **graded.counts}
    if mode in ("pairwise", "both"):
        counts |= outcomes(pair_rows)
    return Judged(quality, counts, graded.costs)


def estimate_run(
    config: Mapping[str, Any],
    questions: Iterable[Question],
    answers: Iterable[_Row],
    baseline_answers: Iterable[_Row] | None,
    others: Sequence[Iterable[_Row]] = (),
) -> Estimate:
    """What :func:`judge_run` would ask and cost; nothing is asked. Arguments and errors as there."""
    from llm_at_home.evaluation.judge.grading import estimate

    items, _ = _items(config, questions, answers, baseline_answers, others)
    return estimate(config, items)


def _items(
    config: Mapping[str, Any],
    questions: Iterable[Question],
    answers: Iterable[_Row],
    baseline_answers: Iterable[_Row] | None,
    others: Sequence[Iterable[_Row]],
) -> tuple[list[Item], int]:
    from llm_at_home.evaluation.judge import settings
    from llm_at_home.evaluation.judge.items import distinctly_named
    from llm_at_home.evaluation.judge.pairwise import pair_items
    from llm_at_home.evaluation.judge.single import single_items

    check(config, has_baseline=baseline_answers is not None, runs=1 + len(others))
    questions, templates, setup = list(questions), settings.templates(config), settings.setup(config)
    repeats, mode = config.get("repeats") or 1, config["mode"]
    sets = [answers, *([baseline_answers] if baseline_answers is not None else []), *others]
    named = distinctly_named([list(one) for one in sets])
    items: list[Item] = []
    unanswered = 0
    if mode in ("single", "both"):
        single, gaps = single_items(questions, named[0], templates, setup, repeats)
        items, unanswered = [*items, *single], unanswered + gaps
    if mode != "single":
        for one, other in combinations(named, 2):
            pairs, gaps = pair_items(questions, one, other, templates, setup, repeats)
            items, unanswered = [*items, *pairs], unanswered + gaps
    return items, unanswered
