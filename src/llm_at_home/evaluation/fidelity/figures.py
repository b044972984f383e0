"""From scores of passages to rows of ``fidelity.jsonl``, and from rows to figures with intervals over passages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llm_at_home.evaluation.fidelity.predictions import Scores
from llm_at_home.evaluation.statistics import bootstrap_draws, interval95, smallest_detectable
from llm_at_home.records.schema import Reading

METHOD = "against_own_unquantized_baseline"
DETECTABLE = "_detectable"
# Only the KL divergences above this percentile of all tokens are kept one by one: the 99th percentile needs no more,
# in any resample of passages that is not very unlike the whole.
KEPT_ABOVE = 90


def rows(name: str, scores: Sequence[Scores]) -> list[dict[str, Any]]:
    """One row of plain JSON a passage: all that the figures and a paired comparison need.

    Args:
        name: of the set of passages.
        scores: of its passages.
    """
    cut = float(np.percentile(np.concatenate([one.kl for one in scores]), KEPT_ABOVE))
    return [
        {
            "set": name,
            "text": i,
            "tokens": len(one.kl),
            "nll": _finite(one.nll),
            "baseline_nll": _finite(one.baseline_nll),
            "kl_sum": _finite(float(one.kl.sum())),
            "agreements": int(one.agrees.sum()),
            "kl_cut": _finite(_short(cut)),
            "kl_above_cut": sorted(_short(value) for value in one.kl[one.kl > cut]),
        }
        for i, one in enumerate(scores)
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _short(value: float) -> float:
    return float(f"{value:.4g}")


@dataclass(frozen=True)
class Sums:
    """The rows of one set as columns: sums over each passage's tokens, of shape (passages,)."""

    tokens: np.ndarray
    nll: np.ndarray
    baseline_nll: np.ndarray
    kl: np.ndarray
    agreements: np.ndarray
    kl_cut: float
    kl_above_cut: Sequence[np.ndarray]

    @classmethod
    def of(cls, kept: Iterable[Mapping[str, Any]], name: str) -> Sums:
        """The columns of the set ``name``; what was not finite is NaN."""
        own = sorted((row for row in kept if row["set"] == name), key=lambda row: row["text"])

        def column(key: str) -> np.ndarray:
            return np.array([row[key] for row in own], dtype=float)

        return cls(
            column("tokens"),
            column("nll"),
            column("baseline_nll"),
            column("kl_sum"),
            column("agreements"),
            float(column("kl_cut")[0]) if own else math.nan,
            [np.array(row["kl_above_cut"], dtype=float) for row in own],
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def of_baseline(self) -> Sums:
        """The same passages with the baseline in the model's place."""
        nothing = np.zeros(len(self))
        none = [np.zeros(0)] * len(self)
        return replace(self, nll=self.baseline_nll, kl=nothing, agreements=self.tokens, kl_cut=0.0, kl_above_cut=none)


def _perplexity(sums: Sums, i: np.ndarray) -> float:
    return float(np.exp(sums.nll[i].sum() / sums.tokens[i].sum()))


def _perplexity_ratio(sums: Sums, i: np.ndarray) -> float:
    return float(np.exp((sums.nll[i].sum() - sums.baseline_nll[i].sum()) / sums.tokens[i].sum()))


def _kl_mean(sums: Sums, i: np.ndarray) -> float:
    return float(sums.kl[i].sum() / sums.tokens[i].sum())


def _kl_p99(sums: Sums, i: np.ndarray) -> float:
    above = np.sort(np.concatenate([sums.kl_above_cut[k] for k in i]))
    below = sums.tokens[i].sum() - len(above)
    # As numpy's percentile; a place among the tokens that were not kept is given the cut, which is at most too high.
    return float(
        np.interp(0.99 * (below + len(above) - 1) - below + 1, np.arange(len(above) + 1), [sums.kl_cut, *above])
    )


def _top1_agreement(sums: Sums, i: np.ndarray) -> float:
    return float(sums.agreements[i].sum() / sums.tokens[i].sum())


# Each figure's unit, and how it is had from the passages that were drawn.
FIGURES: dict[str, tuple[str, Callable[[Sums, np.ndarray], float]]] = {
    "perplexity": ("1", _perplexity),
    "perplexity_ratio": ("1", _perplexity_ratio),
    "kl_divergence_mean": ("nats/token", _kl_mean),
    "kl_divergence_p99": ("nats/token", _kl_p99),
    "top1_agreement": ("1", _top1_agreement),
}


def fidelity_readings(sums: Sums, suffix: str, top_k: int, method: str = METHOD) -> dict[str, Reading]:
    """Perplexity and its ratio, mean and 99th-percentile KL divergence, top-1 agreement, and what each can tell.

    Intervals resample passages. ``FIGURE_detectable`` is the smallest difference from the baseline itself (its own
    perplexity; ratio 1, divergence 0, agreement 1) that so many passages show with a power of 80 % at 5 %, for a model
    whose passages scatter as this one's.

    Args:
        sums: of one set of passages.
        suffix: at the end of each figure's name.
        top_k: how many of the baseline's likeliest tokens the KL divergences tell apart.
        method: of the readings.
    """
    readings = {}
    for name, (unit, statistic) in FIGURES.items():
        how = f"{method}/top_{top_k}_and_rest" if name.startswith("kl_") else method
        figure, detectable = _reading(sums, unit, statistic, how)
        readings[name + suffix] = figure
        readings[name + suffix + DETECTABLE] = detectable
    return readings


def _reading(
    sums: Sums, unit: str, statistic: Callable[[Sums, np.ndarray], float], method: str
) -> tuple[Reading, Reading]:
    n, baseline = len(sums), sums.of_baseline()
    with np.errstate(over="ignore", invalid="ignore"):
        value = statistic(sums, np.arange(n))
        if not math.isfinite(value):
            unknown = Reading.unknown(unit, "the model's logits are not finite, or its losses overflow", method)
            return unknown, unknown
        if n < 2:
            few = Reading.unknown(unit, "one text alone has no spread", method)
            return Reading(value, unit, method, n=n), few
        draws = bootstrap_draws(n, lambda i: statistic(sums, i))
        detectable = smallest_detectable(draws - bootstrap_draws(n, lambda i: statistic(baseline, i)))
    interval = interval95(draws) if np.isfinite(draws).all() else None
    figure = Reading(value, unit, method, interval95=interval, n=n)
    method += "/power_80_percent"
    if not math.isfinite(detectable):
        return figure, Reading.unknown(unit, "the losses of some texts overflow", method)
    return figure, Reading(detectable, unit, method, n=n)
