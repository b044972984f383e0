"""Turns judgments into readings: mean scores and win rates, with intervals over questions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from math import sqrt
from operator import itemgetter
from statistics import mean

from llm_at_home.evaluation.judge.items import Row
from llm_at_home.evaluation.judge.pairwise import inconsistent, points
from llm_at_home.evaluation.judge.single import MISSING_SCORE
from llm_at_home.records.schema import Reading

RESAMPLES = 10_000
_SEED = 0


def single_readings(rows: Iterable[Row], label: str) -> dict[str, Reading]:
    """Mean scores in points (1 to 10): over all, for each turn, for each category.

    The mean is over judgments, as FastChat's ``show_result`` takes it; missing ones are left out there and
    here. ``n`` counts questions, and so does the bootstrap: a question's turns are drawn together.
    """
    rows = list(rows)
    method = f"{label}/single"
    readings = {"judge_score_mean": cluster_mean(rows, score, "points", method)}
    for turn in (1, 2):
        of_turn = [row for row in rows if row["turn"] == turn]
        readings[f"judge_score_turn_{turn}"] = cluster_mean(of_turn, score, "points", method)
    for category, of_category in _by_category(rows).items():
        readings[f"judge_score_{category}"] = cluster_mean(of_category, score, "points", method)
    if any(row.get("repeat") for row in rows):
        readings["judge_repeat_sd"] = _repeat_sd(rows, method)
    return readings


def _repeat_sd(rows: list[Row], method: str) -> Reading:
    """The judge's own noise: the standard deviation between judgments of one answer, pooled over answers."""
    groups: dict[Hashable, list[float]] = defaultdict(list)
    for row in rows:
        if (known := score(row)) is not None:
            groups[row["question_id"], row["turn"], row["model"], row.get("sample", 0)].append(known)
    repeated = [group for group in groups.values() if len(group) > 1]
    if not repeated:
        return Reading.unknown("points", "no answer has two judgments", method)
    freedom = sum(len(group) - 1 for group in repeated)
    squares = sum((value - mean(group)) ** 2 for group in repeated for value in group)
    return Reading(sqrt(squares / freedom), "points", method, n=len(repeated))


def pair_readings(rows: Iterable[Row], label: str) -> dict[str, Reading]:
    """Win rates against the baseline, 0 to 1, ties half: over all questions and turns, and by category."""
    rows = list(rows)
    method = f"{label}/pairwise"
    readings = {"win_rate": cluster_mean(rows, points, "1", method)}
    for category, of_category in _by_category(rows).items():
        readings[f"win_rate_{category}"] = cluster_mean(of_category, points, "1", method)
    return readings | habits(rows, method)


def habits(rows: Iterable[Row], method: str) -> dict[str, Reading]:
    """Of the orders that named a winner, the share won by the answer that stood first, and by the longer one.

    The first is 0.5 for a judge that does not mind the position. The longer answer may well be the better one: a share
    far from 0.5 is a reason to look, and planted pairs tell the two apart (``task=judge_check``).
    """
    orders = [order for row in rows for order in _orders(row)]
    unequal = [order for order in orders if order["longer_won"] is not None]
    figures = {"judge_first_wins": (orders, "first_won"), "judge_longer_wins": (unequal, "longer_won")}
    return {
        name: cluster_mean(found, itemgetter(key), "1", method)
        if found
        else Reading.unknown("1", "no order named a winner between two such answers", method)
        for name, (found, key) in figures.items()
    }


def _orders(row: Row) -> list[Row]:
    """A row for each order that named a winner."""
    found = []
    for name, first in (("g1_winner", "model_1"), ("g2_winner", "model_2")):
        winner = row[name]
        if winner not in ("model_1", "model_2"):
            continue
        one, two = row.get("lengths") or (0, 0)
        longer = None if one == two else float((winner == "model_1") == (one > two))
        first_won = float(winner == first)
        found.append({"question_id": row["question_id"], "first_won": first_won, "longer_won": longer})
    return found


def outcomes(rows: Iterable[Row]) -> dict[str, int]:
    """How many comparisons the first of two models won, tied and lost, and how many have no verdict."""
    found = Counter(points(row) for row in rows)
    return {"wins": found[1.0], "ties": found[0.5], "losses": found[0.0], "no_verdict": found[None]}


def all_pairs_readings(rows: Iterable[Row], label: str) -> dict[str, Reading]:
    """Each model's win rate over its comparisons with all others, 0 to 1, ties half: ``win_rate_of_MODEL``."""
    rows = list(rows)
    models = sorted({row[side] for row in rows for side in ("model_1", "model_2")})
    readings = {}
    for model in models:
        own = [row for row in rows if model in (row["model_1"], row["model_2"])]
        readings[f"win_rate_of_{model}"] = cluster_mean(own, partial(points_of, model=model), "1", f"{label}/all_pairs")
    return readings


def points_of(row: Row, model: str) -> float | None:
    """What a model gets for a comparison, on whichever side it stands."""
    known = points(row)
    return known if known is None or row["model_1"] == model else 1 - known


def tally(single: Iterable[Row], pairs: Iterable[Row]) -> dict[str, int]:
    """How many judgments have a value, how many lack one, and how often the two orders disagree.

    Their sum is what was wanted. A pair counts once, and only when both its orders have a verdict.
    """
    single, pairs = list(single), list(pairs)
    values = [score(row) for row in single] + [points(row) for row in pairs]
    missing = sum(value is None for value in values)
    return {
        "judgments": len(values) - missing,
        "judgments_missing": missing,
        "inconsistent_orders": sum(inconsistent(row) for row in pairs),
    }


def score(row: Row) -> float | None:
    """The points of a single judgment, None when missing."""
    return None if row["score"] == MISSING_SCORE else float(row["score"])


def _by_category(rows: list[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["category"]].append(row)
    return dict(sorted(groups.items()))


def cluster_mean(rows: list[Row], value: Callable[[Row], float | None], unit: str, method: str) -> Reading:
    """The mean over rows that have a value, with an interval that draws whole questions; ``n`` counts questions."""
    by_question: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if (known := value(row)) is not None:
            by_question[row["question_id"]].append(known)
    if not by_question:
        return Reading.unknown(unit, _why(rows), method)
    # Sorted, so that the interval does not depend on the order in which threads finished.
    groups = [by_question[question] for question in sorted(by_question)]
    mean = sum(map(sum, groups)) / sum(map(len, groups))
    return Reading(mean, unit, method, interval95=_interval(groups), n=len(groups))


def _interval(groups: list[list[float]]) -> tuple[float, float] | None:
    """The percentile bootstrap's 95 % interval of the mean over all values, drawing whole questions."""
    if len(groups) < 2:
        return None
    import numpy as np

    sums = np.array([sum(group) for group in groups])
    sizes = np.array([len(group) for group in groups])
    drawn = np.random.default_rng(_SEED).integers(0, len(groups), (RESAMPLES, len(groups)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def _why(rows: list[Row]) -> str:
    reasons = Counter(row.get("missing") or "no reason recorded" for row in rows)
    if not reasons:
        return "no answer to judge"
    reason, times = reasons.most_common(1)[0]
    return f"all {len(rows)} judgments are missing, {times} of them because: {reason}"
