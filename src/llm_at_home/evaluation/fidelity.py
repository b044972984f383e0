"""Fidelity: how far a quantized model's next-token distributions are from those of its own unquantized baseline.

A judge's score moves by noise where these figures do not: they compare the two models on every token of the same texts
(Dutta et al. 2024, "Accuracy is Not All You Need", on flips and KL divergence).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llm_at_home.evaluation.text import bootstrap_interval95
from llm_at_home.records.schema import Reading

METHOD = "against_own_unquantized_baseline"


@dataclass(frozen=True)
class TextFidelity:
    """One text: negative log-likelihoods (nats) under both models, and per token the KL divergence and agreement."""

    nll: float
    baseline_nll: float
    kl: np.ndarray
    agrees: np.ndarray

    def row(self) -> dict[str, Any]:
        """Plain JSON, for paired comparisons of two runs on the same texts."""
        return {
            "tokens": len(self.kl),
            "nll": self.nll,
            "baseline_nll": self.baseline_nll,
            "kl_sum": float(self.kl.sum()),
            "agreements": int(self.agrees.sum()),
        }


def compare(model: Any, baseline: Any, texts: Sequence[Sequence[int]]) -> list[TextFidelity]:
    """Run both models over each text and compare their predictions of every token after the first.

    Args:
        model: the quantized model.
        baseline: the same model without quantization.
        texts: token ids of each text.
    """
    compared = []
    for ids in texts:
        logp, base = (_log_probabilities(one, ids) for one in (model, baseline))
        targets = torch.tensor(list(ids[1:])).unsqueeze(1)
        kl = (base.exp() * (base - logp)).sum(-1)
        compared.append(
            TextFidelity(
                nll=-float(logp.gather(1, targets).sum()),
                baseline_nll=-float(base.gather(1, targets).sum()),
                kl=kl.clamp(min=0).numpy(),  # below zero is rounding
                agrees=(logp.argmax(-1) == base.argmax(-1)).numpy(),
            )
        )
    return compared


def _log_probabilities(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Of shape (tokens - 1, vocabulary), float32, on the host."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1).cpu()


def fidelity_readings(texts: Sequence[TextFidelity]) -> dict[str, Reading]:
    """Perplexity and its ratio, mean and 99th-percentile KL divergence, top-1 agreement; intervals resample texts."""
    nll, base = (np.array([getattr(text, key) for text in texts]) for key in ("nll", "baseline_nll"))
    tokens = np.array([len(text.kl) for text in texts])
    kl_sums = np.array([text.kl.sum() for text in texts])
    agreements = np.array([text.agrees.sum() for text in texts])

    def figure(unit: str, statistic: Any) -> Reading:
        interval = bootstrap_interval95(len(texts), statistic)
        return Reading(statistic(np.arange(len(texts))), unit, METHOD, interval95=interval, n=len(texts))

    return {
        "perplexity": figure("1", lambda i: math.exp(nll[i].sum() / tokens[i].sum())),
        "perplexity_ratio": figure("1", lambda i: math.exp((nll[i].sum() - base[i].sum()) / tokens[i].sum())),
        "kl_divergence_mean": figure("nats/token", lambda i: float(kl_sums[i].sum() / tokens[i].sum())),
        "kl_divergence_p99": figure(
            "nats/token", lambda i: float(np.percentile(np.concatenate([texts[k].kl for k in i]), 99))
        ),
        "top1_agreement": figure("1", lambda i: float(agreements[i].sum() / tokens[i].sum())),
    }
