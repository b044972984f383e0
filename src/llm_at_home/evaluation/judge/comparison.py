"""Two judged runs against each other, question by question: paired differences, and what could be seen at all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_at_home.errors import Refusal
from llm_at_home.evaluation.judge.items import Row
from llm_at_home.evaluation.judge.summary import score
from llm_at_home.evaluation.statistics import bootstrap_draws, interval95, smallest_detectable
from llm_at_home.records import store
from llm_at_home.records.jsonl import read_jsonl
from llm_at_home.records.schema import Record

PERMUTATIONS = 10_000
LEAST_P = 0.001  # below which a terminal shows no more digits
_SEED = 0
# What of the group judge decides which scale its scores are on.
SAME_JUDGE = ("rating", "grammar", "references", "templates", "temperature")
# What two runs of one model under two seeds share.
_SAME = ("model", "quant", "dtype", "adapter_path", "questions", "limit")


@dataclass(frozen=True)
class Difference:
    """Mean score of a, of b, and a - b over the same questions, in points.

    ``p_value`` is of a paired permutation test that flips the signs of whole questions' differences, two-sided;
    ``detectable`` the true difference that a test at 5 % finds with a power of 80 %. Interval and detectable size are
    None for a single question.
    """

    what: str
    a: float
    b: float
    interval95: tuple[float, float] | None
    p_value: float
    detectable: float | None
    n: int
    missing: int

    @property
    def difference(self) -> float:
        """a - b."""
        return self.a - self.b


def compare_rows(a: list[Row], b: list[Row], what: str = "all") -> Difference | None:
    """The difference of two sets of single judgments on the questions and turns that both have; None without any.

    A question's turns, samples and repeats are averaged first and drawn together.
    """
    means, missing = _means(a), 0
    others = _means(b)
    missing = len(means.keys() ^ others.keys())
    shared = sorted(means.keys() & others.keys())
    if not shared:
        return None
    by_question: dict[Hashable, list[tuple[float, float]]] = defaultdict(list)
    for question, turn in shared:
        by_question[question].append((means[question, turn], others[question, turn]))
    pairs = np.array([np.mean(turns, axis=0) for turns in by_question.values()])
    differences = pairs[:, 0] - pairs[:, 1]
    n = len(differences)
    draws = bootstrap_draws(n, lambda drawn: float(differences[drawn].mean())) if n > 1 else None
    return Difference(
        what,
        float(pairs[:, 0].mean()),
        float(pairs[:, 1].mean()),
        interval95(draws) if draws is not None else None,
        permutation_p_value(differences),
        smallest_detectable(draws) if draws is not None else None,
        n,
        missing,
    )


def permutation_p_value(differences: np.ndarray) -> float:
    """Two-sided p value of the mean of paired differences: the share of random signs that give one as far from 0.

    The observed signs count as one of the draws, so the value is never 0 (Phipson and Smyth 2010).
    """
    signs = np.random.default_rng(_SEED).choice((-1.0, 1.0), (PERMUTATIONS, len(differences)))
    drawn = np.abs(signs @ differences) / len(differences)
    return float((1 + (drawn >= abs(differences.mean()) - 1e-12).sum()) / (PERMUTATIONS + 1))


@dataclass(frozen=True)
class JudgedRun:
    """A finished run of ``task=judge`` with its single judgments."""

    record: Record
    rows: list[Row]

    @classmethod
    def load(cls, folder: Path | str) -> JudgedRun:
        """Read a run folder.

        Raises:
            Refusal: when it holds no finished run of the judge with scores.
        """
        record, place = store.load(folder), store.run_folder(folder)
        file = place / "judgments.jsonl"
        if record.config.get("task") != "judge" or record.status != "ok" or not file.is_file():
            raise Refusal(f"{folder} holds no finished run of task=judge: run `python evaluate.py answers=...` first")
        rows = [row for row in read_jsonl(file) if "model" in row]
        if not rows:
            raise Refusal(f"{folder} has no scores to compare: run it with judge.mode=single or both")
        return cls(record, rows)


def compare(a: JudgedRun, b: JudgedRun) -> list[Difference]:
    """Overall, each turn's and each category's difference.

    Raises:
        Refusal: when another judge, one asked otherwise, or none of the same questions is behind the other run.
    """
    judges = [{row["judge"][0] for row in run.rows} for run in (a, b)]
    if judges[0] != judges[1]:
        raise Refusal(f"scores of two judges do not compare: {sorted(judges[0])} and {sorted(judges[1])}")
    for key in SAME_JUDGE:
        values = [(run.record.config.get("judge") or {}).get(key) for run in (a, b)]
        if values[0] != values[1]:
            raise Refusal(f"scores by judge.{key}={values[0]} and by {values[1]} do not compare: judge both alike")
    found = [compare_rows(a.rows, b.rows)]

    def part(what: str, key: str, value: Any) -> Difference | None:
        one, other = ([row for row in run.rows if row.get(key) == value] for run in (a, b))
        return compare_rows(one, other, what)

    for turn in (1, 2):
        found.append(part(f"turn {turn}", "turn", turn))
    found += [part(name, "category", name) for name in sorted({row.get("category") or "" for row in a.rows})]
    differences = [one for one in found if one is not None]
    if not differences:
        raise Refusal("the two runs share no judged question")
    return differences


def is_control(a: JudgedRun, b: JudgedRun) -> bool:
    """Whether both runs are of one model under two seeds, so that their difference is noise."""
    configs = [_subject(run.record) for run in (a, b)]
    return all(configs) and _same(*configs) and configs[0].get("seed") != configs[1].get("seed")


def as_text(differences: list[Difference], control: bool) -> str:
    """A table for a terminal."""
    lines = [
        f"{'':<12} {'a':>7} {'b':>7} {'a - b':>8}  {'95 % interval':<20} {'p':>6} {'detectable':>11} {'n':>4} missing"
    ]
    for one in differences:
        ends = f"[{one.interval95[0]:+.3f}, {one.interval95[1]:+.3f}]" if one.interval95 else "unknown: one question"
        seen = f"{one.detectable:.3f}" if one.detectable is not None else "-"
        p = f"{one.p_value:.3f}" if one.p_value >= LEAST_P else f"<{LEAST_P}"
        lines.append(
            f"{one.what:<12} {one.a:>7.3f} {one.b:>7.3f} {one.difference:>+8.3f}  {ends:<20} {p:>6} "
            f"{seen:>11} {one.n:>4} {one.missing}"
        )
    if len(differences) > 1:
        lines.append(
            f"each p and interval is of its line alone: of the {len(differences) - 1} lines below the first, one in "
            "twenty shows a difference by chance"
        )
    if control:
        lines.append("one model under two seeds: these differences are the noise floor, smaller ones are nothing")
    return "\n".join(lines)


def _means(rows: list[Row]) -> dict[tuple[Any, Any], float]:
    groups: dict[tuple[Any, Any], list[float]] = defaultdict(list)
    for row in rows:
        if (known := score(row)) is not None:
            groups[row["question_id"], row["turn"]].append(known)
    return {key: float(np.mean(values)) for key, values in groups.items()}


def _subject(record: Record) -> Mapping[str, Any]:
    found = (record.subject or {}).get("config")
    return found if isinstance(found, dict) else {}


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in _SAME)
