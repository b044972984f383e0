"""Tests a judge before it is believed: accuracy and biases on planted pairs, and one model's two seeds as noise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llm_at_home.evaluation.judge import Judged, settings
from llm_at_home.evaluation.judge.comparison import compare_rows
from llm_at_home.evaluation.judge.grading import grade
from llm_at_home.evaluation.judge.items import Item, Row, distinctly_named
from llm_at_home.evaluation.judge.pairwise import ERROR, inconsistent, pair_items, points
from llm_at_home.evaluation.judge.planted import KINDS, PADDED, REFERENCE, WORSE, planted_sets
from llm_at_home.evaluation.judge.prompts import Question
from llm_at_home.evaluation.judge.single import single_items
from llm_at_home.evaluation.judge.summary import cluster_mean, habits, score, tally
from llm_at_home.evaluation.statistics import bootstrap_draws, smallest_detectable
from llm_at_home.records.schema import Reading

OWN = "own"


@dataclass(frozen=True)
class FirstTurn:
    """A question's first turn, without its reference: a judge that saw it would only have to compare."""

    question_id: int
    category: str
    turns: Sequence[str]
    reference: Sequence[str] | None = None


def check_judge(
    config: Mapping[str, Any],
    questions: Sequence[Question],
    folder: Path,
    seed: int = 0,
    own_answers: Iterable[Row] = (),
    same_model: tuple[Sequence[Question], Iterable[Row], Iterable[Row]] | None = None,
) -> Judged:
    """Planted pairs, and an A/A comparison where two runs of one model are given.

    The reference answers are what is planted, so the judge does not get to see them.

    Args:
        config: the group ``judge``.
        questions: with reference answers.
        folder: of the run.
        seed: of the damage done to the references.
        own_answers: answers of the judge's own model, if any: how often it puts them above the references is its
            self-preference.
        same_model: questions, and one model's answers to them under two seeds; they are graded as in a run of the
            judge, and compared in pairs too unless ``mode`` is single.

    Returns:
        Readings, each with an interval over questions: ``judge_accuracy*`` is the share of planted pairs in which the
        reference wins in both orders (0.5 is a coin's, with a tie worth half), ``judge_accuracy_single*`` the same by
        scores, ``judge_position_bias`` the share of decided orders that the first answer won, ``judge_consistency`` how
        often both orders agree, ``judge_length_bias`` what the padded answer gets against the plain one (0.5 is none),
        ``judge_self_preference``, and ``judge_aa_*``.

    Raises:
        Refusal: when too few questions have references.
        JudgeError: as :func:`~llm_at_home.evaluation.judge.judge_run`.
    """
    settings.check({**config, "mode": "single"})  # no baseline is needed here
    templates, setup = settings.templates(config), settings.setup(config)
    bare = [FirstTurn(q.question_id, q.category, list(q.turns[:1])) for q in questions]
    sets = planted_sets(questions, seed)
    if own := [_first_turn(row, OWN) for row in own_answers]:
        with_reference = {row["question_id"] for row in sets[REFERENCE]}
        sets[OWN] = [row for row in own if row["question_id"] in with_reference]
    items: list[Item] = []
    for kind, rows in sets.items():
        items += single_items(bare, rows, templates, setup)[0]
        if kind != REFERENCE:
            items += pair_items(bare, sets[REFERENCE], rows, templates, setup)[0]
    if same_model is not None:
        asked, *sides = same_model
        first, second = distinctly_named([list(one) for one in sides])
        items += single_items(asked, first, templates, setup)[0]
        items += single_items(asked, second, templates, setup)[0]
        if config["mode"] != "single":
            items += pair_items(asked, first, second, templates, setup)[0]
    graded = grade(config, items, folder)
    single = [row for row in graded.rows if "model" in row]
    pairs = [row for row in graded.rows if "model" not in row]
    planted = [row for row in pairs if row["model_1"] == REFERENCE]
    label = settings.label(config)
    quality = _accuracy(planted, single, label) | _biases(planted, label)
    if same_model is not None:
        quality |= _noise(
            [row for row in single if row["model"] not in sets], [row for row in pairs if row not in planted], label
        )
    counts = {**tally(single, pairs), "planted_pairs": len(planted), **graded.counts}
    return Judged(quality, counts, graded.costs)


def _first_turn(row: Row, name: str) -> Row:
    return {**row, "model_id": name, "choices": [{"index": 0, "turns": row["choices"][0]["turns"][:1]}]}


def _accuracy(planted: list[Row], single: list[Row], label: str) -> dict[str, Reading]:
    """How often the reference is put above what was made of it: by pairs, and by scores."""
    worse = [row for row in planted if row["model_2"] in WORSE]
    by_score = _by_scores(single)
    scored = [row for row in by_score if row["model_2"] in WORSE]
    readings = {
        "judge_accuracy": cluster_mean(worse, points, "1", f"{label}/planted_pairs"),
        "judge_accuracy_single": cluster_mean(scored, _worth, "1", f"{label}/planted_scores"),
    }
    for kind in KINDS:
        if kind == PADDED:
            continue
        of_kind = [row for row in planted if row["model_2"] == kind]
        readings[f"judge_accuracy_{kind}"] = cluster_mean(of_kind, points, "1", f"{label}/planted_pairs")
        of_kind = [row for row in scored if row["model_2"] == kind]
        readings[f"judge_accuracy_single_{kind}"] = cluster_mean(of_kind, _worth, "1", f"{label}/planted_scores")
    return readings


def _biases(planted: list[Row], label: str) -> dict[str, Reading]:
    method = f"{label}/planted_pairs"
    whole = [row for row in planted if ERROR not in (row["g1_winner"], row["g2_winner"])]
    padded = [row for row in planted if row["model_2"] == PADDED]
    readings = {
        "judge_position_bias": habits(planted, method)["judge_first_wins"],
        "judge_consistency": cluster_mean(whole, lambda row: 0.0 if inconsistent(row) else 1.0, "1", method),
        "judge_length_bias": cluster_mean(padded, _other_side, "1", method),
    }
    if own := [row for row in planted if row["model_2"] == OWN]:
        readings["judge_self_preference"] = cluster_mean(own, _other_side, "1", method)
    return readings


def _other_side(row: Row) -> float | None:
    known = points(row)
    return None if known is None else 1 - known


def _by_scores(single: list[Row]) -> list[Row]:
    """A row for each damaged answer with what its reference gets against it by the scores alone."""
    scores = {(row["model"], row["question_id"]): score(row) for row in single}
    found = []
    for (model, question_id), value in scores.items():
        reference = scores.get((REFERENCE, question_id))
        if model == REFERENCE or value is None or reference is None:
            continue
        worth = 0.5 if reference == value else float(reference > value)
        found.append({"question_id": question_id, "model_2": model, "worth": worth})
    return found


def _worth(row: Row) -> float:
    return row["worth"]


def _noise(single: list[Row], pairs: list[Row], label: str) -> dict[str, Reading]:
    """What one model's two seeds differ by, and what a difference must be to be seen on these questions."""
    names = sorted({row["model"] for row in single}, key=lambda name: ("#" in name, name))
    sides = [[row for row in single if row["model"] == name] for name in names]
    method = f"{label}/aa"
    readings: dict[str, Reading] = {}
    if len(sides) == 2 and (difference := compare_rows(sides[0], sides[1])):
        interval = difference.interval95
        readings["judge_aa_score_difference"] = Reading(
            difference.difference, "points", method, interval95=interval, n=difference.n
        )
        if difference.detectable is not None:
            readings["judge_aa_score_detectable"] = Reading(difference.detectable, "points", method, n=difference.n)
    if not pairs:
        return readings
    readings["judge_aa_win_rate"] = cluster_mean(pairs, points, "1", method)
    by_question: dict[int, list[float]] = defaultdict(list)
    for row in pairs:
        if (known := points(row)) is not None:
            by_question[row["question_id"]].append(known)
    if len(by_question) > 1:
        means = np.array([np.mean(by_question[question]) for question in sorted(by_question)])
        draws = bootstrap_draws(len(means), lambda drawn: float(means[drawn].mean()))
        rate = readings["judge_aa_win_rate"]
        readings["judge_aa_win_rate_detectable"] = replace(rate, value=smallest_detectable(draws), interval95=None)
    return readings
