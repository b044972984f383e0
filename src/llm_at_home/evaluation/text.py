"""Exact match, token F1, BLEU, ROUGE and refusals on a data set's test split."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

import numpy as np

from llm_at_home.evaluation.statistics import bootstrap_interval95
from llm_at_home.records.schema import Reading

ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
NO_QUESTION = "the test split has no such question"


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
        ``exact_match`` and ``token_f1`` (SQuAD's normalisation, Rajpurkar et al. 2016), ``reference_contained`` (the
        answer holds the reference, whatever else it says: fair to a model that answers in sentences), ``bleu`` and
        ``rouge_1``, ``rouge_2``, ``rouge_l`` over the answerable questions, ``refusal_recall`` over the unanswerable
        ones, and ``false_refusal_rate``. The scores of single answers are torchmetrics'.
    """
    answerable = [i for i, kind in enumerate(kinds) if kind != "refusal"]
    unanswerable = [i for i, kind in enumerate(kinds) if kind == "refusal"]
    said, expected = ([texts[i] for i in answerable] for texts in (predictions, references))
    pairs = list(zip(said, expected, strict=True))
    scores = [squad_scores(*pair) for pair in pairs]
    overlaps = [rouge_scores(*pair) for pair in pairs]
    figures = {
        "exact_match": share([em for em, _ in scores], "squad"),
        "token_f1": share([f1 for _, f1 in scores], "squad"),
        "reference_contained": share([contains(*pair) for pair in pairs], "squad_words"),
        "bleu": corpus_bleu(said, expected),
        **{name: share([one[name] for one in overlaps], "rouge_f1") for name in ROUGE},
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


def rouge_scores(prediction: str, reference: str) -> dict[str, float]:
    """F1 of the words, word pairs and longest common subsequence of one answer, each 0 to 1 (Lin 2004)."""
    from torchmetrics.functional.text import rouge_score

    result = rouge_score(prediction, reference, rouge_keys=tuple(ROUGE.values()))
    return {name: float(result[f"{key}_fmeasure"]) for name, key in ROUGE.items()}


def corpus_bleu(predictions: Sequence[str], references: Sequence[str]) -> Reading:
    """BLEU-4 of all answers together, 0 to 1, with SacreBLEU's ``13a`` tokens (Papineni et al. 2002; Post 2018).

    BLEU is no mean over answers: a short answer alone has no four-grams to match. The interval resamples each
    question's counts, which are then summed as over the whole split.
    """
    from torchmetrics.text import SacreBLEUScore

    method = "sacrebleu_13a_corpus"
    if not predictions:
        return Reading.unknown("1", NO_QUESTION, method)
    metric = SacreBLEUScore()
    counts = []
    for prediction, reference in zip(predictions, references, strict=True):
        metric.reset()
        metric.update([prediction], [[reference]])
        lengths = [float(metric.preds_len), float(metric.target_len)]
        counts.append([*metric.numerator.tolist(), *metric.denominator.tolist(), *lengths])
    table = np.array(counts)
    if not table[:, 7].any():
        return Reading.unknown("1", "no answer has the four tokens that BLEU-4 counts", method)
    interval = bootstrap_interval95(len(table), lambda chosen: _bleu(table[chosen].sum(0)))
    return Reading(_bleu(table.sum(0)), "1", method, interval95=interval, n=len(table))


def _bleu(counts: np.ndarray) -> float:
    """BLEU from a corpus's sums: matches and numbers of 1- to 4-grams, lengths of answers and of references."""
    matches, numbers, (said, expected) = counts[:4], counts[4:8], counts[8:]
    if not matches.all():
        return 0.0
    brevity = min(0.0, 1 - expected / said)
    return float(np.exp(np.log(matches / numbers).mean() + brevity))


def is_refusal(answer: str, refusal: str) -> bool:
    """Whether the answer holds the data set's refusal, whatever case and punctuation."""
    return _plain(refusal) in _plain(answer)


def contains(text: str, reference: str) -> bool:
    """Whether a text holds the reference, which is not empty, as whole words; SQuAD's normalisation of both."""
    found, wanted = (" ".join(re.sub(r"\b(a|an|the)\b", " ", _plain(one)).split()) for one in (text, reference))
    return bool(wanted) and f" {wanted} " in f" {found} "


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.lower().translate(str.maketrans("", "", string.punctuation))).strip()


def share(values: Sequence[float], method: str) -> Reading:
    """The mean of per-question values with its bootstrap interval; unknown where there is no question."""
    if not values:
        return Reading.unknown("1", NO_QUESTION, method)
    numbers = np.asarray(values, dtype=float)
    interval = bootstrap_interval95(len(numbers), lambda chosen: float(numbers[chosen].mean()))
    return Reading(float(numbers.mean()), "1", method, interval95=interval, n=len(numbers))
