"""Exact match, token F1 and refusals on a data set's test split."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

import numpy as np

from llm_at_home.records.schema import Reading

BOOTSTRAP_SAMPLES = 2000


def text_quality(
    kinds: Sequence[str], predictions: Sequence[str], references: Sequence[str], refusal: str | None
) -> dict[str, Reading]:
    """Figures over a test split, each a share from 0 to 1 with a bootstrap 95 % interval over its questions.

    Args:
        kinds: of each question; ``refusal`` marks one that the data do not answer.
        predictions: the model's answers.
        references: the expected answers.
        refusal: the sentence with which the data set refuses, or None where it has none.

    Returns:
        ``exact_match`` and ``token_f1`` (SQuAD's normalisation, Rajpurkar et al. 2016, through torchmetrics) over the
        answerable questions, ``refusal_recall`` over the unanswerable ones, and ``false_refusal_rate``.
    """
    answerable = [i for i, kind in enumerate(kinds) if kind != "refusal"]
    unanswerable = [i for i, kind in enumerate(kinds) if kind == "refusal"]
    scores = [squad_scores(predictions[i], references[i]) for i in answerable]
    figures = {
        "exact_match": share([em for em, _ in scores], "squad"),
        "token_f1": share([f1 for _, f1 in scores], "squad"),
    }
    if refusal is not None:
        refused = [is_refusal(prediction, refusal) for prediction in predictions]
        figures["refusal_recall"] = share([refused[i] for i in unanswerable], "canonical_refusal")
        figures["false_refusal_rate"] = share([refused[i] for i in answerable], "canonical_refusal")
    return figures


def squad_scores(prediction: str, reference: str) -> tuple[float, float]:
    """Exact match and token F1 of one answer, each 0 to 1."""
    from torchmetrics.functional.text import squad

    result = squad(
        {"prediction_text": prediction, "id": "0"}, {"answers": {"answer_start": [0], "text": [reference]}, "id": "0"}
    )
    return float(result["exact_match"]) / 100, float(result["f1"]) / 100


def is_refusal(answer: str, refusal: str) -> bool:
    """Whether the answer holds the data set's refusal, whatever case and punctuation."""
    return _plain(refusal) in _plain(answer)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.lower().translate(str.maketrans("", "", string.punctuation))).strip()


def share(values: Sequence[float], method: str) -> Reading:
    """The mean of per-question values with its bootstrap interval; unknown where there is no question."""
    if not values:
        return Reading.unknown("1", "the test split has no such question", method)
    numbers = np.asarray(values, dtype=float)
    interval = bootstrap_interval95(len(numbers), lambda chosen: float(numbers[chosen].mean()))
    return Reading(float(numbers.mean()), "1", method, interval95=interval, n=len(numbers))


def bootstrap_interval95(n: int, statistic: Callable[[np.ndarray], float], seed: int = 0) -> tuple[float, float] | None:
    """The percentile bootstrap's 95 % interval of a statistic over ``n`` items drawn with replacement.

    Args:
        n: how many items there are; None is returned for fewer than two.
        statistic: maps an index array of shape (n,) to a number.
        seed: of the draws.
    """
    if n < 2:
        return None
    generator = np.random.default_rng(seed)
    draws = [statistic(generator.integers(0, n, n)) for _ in range(BOOTSTRAP_SAMPLES)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return (float(low), float(high))
