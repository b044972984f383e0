"""Two judges, or a judge and people, on the same answers: how often they agree, with ties and without.

As in Zheng et al. 2023, section 4.2.

A judge is a run folder of ``task=judge``, a file of judgments in FastChat's format, or a CSV file of people's grades
with the columns question_id, model, rater and grade.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from llm_at_home.errors import Refusal
from llm_at_home.evaluation.judge.items import Row
from llm_at_home.evaluation.judge.pairwise import points
from llm_at_home.evaluation.judge.summary import score
from llm_at_home.evaluation.statistics import bootstrap_interval95
from llm_at_home.records import store
from llm_at_home.records.jsonl import read_jsonl

#: Scores as close as this are a tie, as in FastChat.
TIE_DELTA = 0.1
COLUMNS = ("question_id", "model", "rater", "grade")
_TIE = 0.5
_ALL_TURNS = 0

Pair = tuple[int, int, str, str]  # question, turn (0 for the whole conversation), and the two models in order


@dataclass
class Source:
    """One judge's word: by rater, scores of answers and points of the first of two models (1, 0.5, 0)."""

    name: str
    scores: dict[str, dict[tuple[int, int, str], list[float]]] = field(default_factory=dict)
    pairs: dict[str, dict[Pair, list[float]]] = field(default_factory=dict)
    by_turn: bool = True
    judges: set[str] = field(default_factory=set)

    def votes(self, by_turn: bool) -> dict[Pair, list[float]]:
        """Each rater's vote on each pair of models: 1, 0.5 or 0 for the first; direct comparisons go before scores."""
        votes: dict[Pair, list[float]] = defaultdict(list)
        for rater in self.scores.keys() | self.pairs.keys():
            own = {**self._from_scores(rater, by_turn), **self._from_pairs(rater, by_turn)}
            for key, vote in own.items():
                votes[key].append(vote)
        return votes

    def means(self, by_turn: bool) -> dict[tuple[int, int, str], float]:
        """The mean score of each answer over raters."""
        groups: dict[tuple[int, int, str], list[float]] = defaultdict(list)
        for scores in self.scores.values():
            for (question, turn, model), values in scores.items():
                groups[question, turn if by_turn else _ALL_TURNS, model] += values
        return {key: float(np.mean(values)) for key, values in groups.items()}

    def _from_scores(self, rater: str, by_turn: bool) -> dict[Pair, float]:
        groups: dict[tuple[int, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for (question, turn, model), values in self.scores.get(rater, {}).items():
            groups[question, turn if by_turn else _ALL_TURNS][model] += values
        votes = {}
        for (question, turn), models in groups.items():
            for one, other in combinations(sorted(models), 2):
                lead = float(np.mean(models[one]) - np.mean(models[other]))
                votes[question, turn, one, other] = _TIE if abs(lead) <= TIE_DELTA else float(lead > 0)
        return votes

    def _from_pairs(self, rater: str, by_turn: bool) -> dict[Pair, float]:
        groups: dict[Pair, list[float]] = defaultdict(list)
        for (question, turn, one, other), values in self.pairs.get(rater, {}).items():
            groups[question, turn if by_turn else _ALL_TURNS, one, other] += values
        means = {key: float(np.mean(values)) for key, values in groups.items()}
        return {key: _TIE if mean == _TIE else float(mean > _TIE) for key, mean in means.items()}


@dataclass(frozen=True)
class Agreement:
    """How often two judges give the same vote. None where they share no such pair.

    ``without_ties`` is over pairs that both decide; random votes would reach 1/3 and 1/2.
    """

    votes: int
    with_ties: float | None
    with_ties_interval: tuple[float, float] | None
    decided: int
    without_ties: float | None
    without_ties_interval: tuple[float, float] | None
    spearman: float | None
    answers: int
    self_preference: dict[str, float]

    def as_text(self, a: str, b: str) -> str:
        """Lines for a terminal."""

        def told(value: float | None, ends: tuple[float, float] | None, n: int, chance: str) -> str:
            if value is None:
                return "unknown: no such vote is shared"
            interval = f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else ""
            return f"{100 * value:.1f} %{interval}, n = {n} votes (at random {chance} %)"

        rank = "unknown: fewer than three scored answers are shared, or one judge gives them all the same score"
        lines = [
            f"{a} and {b}",
            f"agreement with ties:    {told(self.with_ties, self.with_ties_interval, self.votes, '33.3')}",
            f"agreement without ties: {told(self.without_ties, self.without_ties_interval, self.decided, '50')}",
            "rank correlation:       "
            + (rank if self.spearman is None else f"{self.spearman:.3f} (Spearman), n = {self.answers} answers"),
        ]
        lines += [
            f"self-preference of {model}: {100 * lead:+.1f} points of win rate against the other judge"
            for model, lead in self.self_preference.items()
        ]
        return "\n".join(lines)


def load(path: Path | str) -> Source:
    """Read a judge's word.

    Raises:
        Refusal: for a file that is none of the three.
    """
    path = Path(path)
    if path.is_dir():
        path = store.run_folder(path) / "judgments.jsonl"
    if not path.is_file():
        raise Refusal(
            f"there are no judgments at {path}: give a judge's run folder, its judgments.jsonl, or a CSV file"
        )
    return _people(path) if path.suffix == ".csv" else from_rows(str(path), read_jsonl(path))


def from_rows(name: str, rows: Iterable[Row]) -> Source:
    """A source of FastChat's judgment rows, single, pairwise or both.

    Raises:
        Refusal: for rows of another kind.
    """
    source = Source(name)
    scores: dict[tuple[int, int, str], list[float]] = defaultdict(list)
    pairs: dict[Pair, list[float]] = defaultdict(list)
    for number, row in enumerate(rows, 1):
        try:
            source.judges.add(str(row["judge"][0]))
            question, turn = row["question_id"], row["turn"]
            if "model" in row:
                if (known := score(row)) is not None:
                    scores[question, turn, row["model"]].append(known)
            elif (worth := points(row)) is not None:
                one, other = row["model_1"], row["model_2"]
                key = (question, turn, *sorted((one, other)))
                pairs[key].append(worth if one <= other else 1 - worth)
        except (KeyError, TypeError, IndexError) as error:
            raise Refusal(f"row {number} of {name} is no judgment in FastChat's format: {error!r}") from None
    source.scores["judge"], source.pairs["judge"] = dict(scores), dict(pairs)
    return source


def agreement(a: Source, b: Source) -> Agreement:
    """How far two judges agree on the pairs of models and on the answers that both have seen.

    Each of a's raters is set against each of b's. Where one of them graded whole conversations, the other's turns are
    averaged.

    Raises:
        Refusal: when they share neither a pair nor an answer.
    """
    by_turn = a.by_turn and b.by_turn
    votes_a, votes_b = a.votes(by_turn), b.votes(by_turn)
    compared = [
        (key[0], one, other)
        for key in sorted(votes_a.keys() & votes_b.keys())
        for one in votes_a[key]
        for other in votes_b[key]
    ]
    decided = [vote for vote in compared if _TIE not in vote[1:]]
    means_a, means_b = a.means(by_turn), b.means(by_turn)
    shared = sorted(means_a.keys() & means_b.keys())
    if not compared and not shared:
        raise Refusal(
            f"{a.name} and {b.name} have judged nothing in common: model names and questions must be the same"
        )
    with_ties, without = _share(compared), _share(decided)
    return Agreement(
        len(compared),
        *with_ties,
        len(decided),
        *without,
        spearman([means_a[key] for key in shared], [means_b[key] for key in shared]),
        len(shared),
        _self_preference(a, votes_a, votes_b) | _self_preference(b, votes_b, votes_a),
    )


def spearman(x: list[float], y: list[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None for fewer than three or for constants."""
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: list[float]) -> np.ndarray:
    array = np.asarray(values)
    return np.array([(array < value).sum() + ((array == value).sum() + 1) / 2 for value in array])


def _share(votes: list[tuple[int, float, float]]) -> tuple[float | None, tuple[float, float] | None]:
    if not votes:
        return None, None
    by_question: dict[int, list[float]] = defaultdict(list)
    for question, one, other in votes:
        by_question[question].append(float(one == other))
    sums = np.array([sum(group) for group in by_question.values()])
    sizes = np.array([len(group) for group in by_question.values()])
    interval = bootstrap_interval95(len(sums), lambda drawn: float(sums[drawn].sum() / sizes[drawn].sum()))
    return float(sums.sum() / sizes.sum()), interval


def _self_preference(judge: Source, own: dict[Pair, list[float]], other: dict[Pair, list[float]]) -> dict[str, float]:
    """By model that is the judge itself: its win rate by its own word less that by the other's, on the same pairs."""
    found = {}
    for model in judge.judges:
        keys = [key for key in own.keys() & other.keys() if model in key[2:]]
        if keys:
            rates = [
                float(np.mean([_of(model, key, float(np.mean(votes[key]))) for key in keys])) for votes in (own, other)
            ]
            found[model] = rates[0] - rates[1]
    return found


def _of(model: str, key: Pair, points_of_first: float) -> float:
    return points_of_first if key[2] == model else 1 - points_of_first


def _people(path: Path) -> Source:
    source = Source(str(path), by_turn=False)
    # Spreadsheets begin their files with a byte order mark.
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise Refusal(f"{path} lacks the column {missing[0]}: people's grades have {', '.join(COLUMNS)}")
        for number, row in enumerate(reader, 2):
            if row["grade"] == "":
                continue  # an answer that this rater has not graded, as in grades.csv of an unfinished study
            try:
                key = (int(row["question_id"]), _ALL_TURNS, row["model"])
                grade = float(row["grade"])
            except (TypeError, ValueError):
                raise Refusal(f"line {number} of {path} holds no question_id and grade that are numbers") from None
            source.scores.setdefault(row["rater"], {}).setdefault(key, []).append(grade)
    return source
