"""A baseline's predictions, kept small, and a model's scores against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_at_home.evaluation.fidelity.passages import Passage


@dataclass(frozen=True)
class Predictions:
    """What the baseline predicts at each counted token of one passage, or of several one after the other.

    ``target`` is the log-probability (nats) of the token that is there and ``best`` the likeliest token, both of shape
    (tokens,). ``ids`` and ``logp``, of shape (tokens, k), are the k likeliest tokens; ``rest``, of shape (tokens,), is
    the logarithm of the mass of all others, minus infinity where k covers the vocabulary.
    """

    target: np.ndarray
    best: np.ndarray
    ids: np.ndarray
    logp: np.ndarray
    rest: np.ndarray


@dataclass(frozen=True)
class Scores:
    """One passage: negative log-likelihoods (nats) under both models, and per token the KL divergence and agreement."""

    nll: float
    baseline_nll: float
    kl: np.ndarray
    agrees: np.ndarray


def predict(model: Any, passage: Passage, k: int) -> Predictions:
    """Run the baseline over a passage and keep its ``k`` likeliest tokens at each place."""
    logp = _log_probabilities(model, passage)
    top = logp.topk(min(k, logp.shape[1]))
    # Half the space, where the vocabulary allows it.
    kind = np.uint16 if logp.shape[1] <= 2**16 else np.uint32
    return Predictions(
        target=_host(_at_targets(logp, passage)),
        best=_host(logp.argmax(-1)).astype(kind),
        ids=_host(top.indices).astype(kind),
        logp=_host(top.values),
        rest=_host(_log_rest(logp, top.indices)),
    )


def score(model: Any, passage: Passage, baseline: Predictions) -> Scores:
    """Run a model over a passage and compare its predictions with the baseline's.

    The KL divergence is that of the baseline's k likeliest tokens with all others lumped into one. By the
    data-processing inequality it is at most the one over the whole vocabulary.
    """
    logp = _log_probabilities(model, passage)
    ids = torch.tensor(baseline.ids.astype(np.int64), device=logp.device)
    base, base_rest = (torch.tensor(part, device=logp.device) for part in (baseline.logp, baseline.rest))
    top = (base.exp() * (base - logp.gather(1, ids))).double().sum(-1)
    rest = base_rest.exp() * (base_rest - _log_rest(logp, ids))
    kl = top + torch.where(base_rest.isneginf(), 0.0, rest.double())
    return Scores(
        nll=-float(_at_targets(logp, passage).double().sum()),
        baseline_nll=-float(baseline.target.astype(np.float64).sum()),
        kl=np.maximum(_host(kl), 0.0),  # below zero is rounding
        agrees=_host(logp.argmax(-1)) == baseline.best,
    )


def _log_probabilities(model: Any, passage: Passage) -> torch.Tensor:
    """Of the counted tokens: shape (tokens, vocabulary), float32, on the model's device."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([passage.ids], device=model.device)).logits
        return torch.log_softmax(logits[0, passage.first - 1 : -1].float(), dim=-1)


def _at_targets(logp: torch.Tensor, passage: Passage) -> torch.Tensor:
    targets = torch.tensor(passage.ids[passage.first :], device=logp.device)
    return logp.gather(1, targets.unsqueeze(1)).squeeze(1)


def _log_rest(logp: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The logarithm of the mass outside ``ids``."""
    return logp.scatter(1, ids, -torch.inf).logsumexp(-1)


def _host(values: torch.Tensor) -> np.ndarray:
    return values.cpu().numpy()


def save(predictions: Sequence[Predictions], file: Path) -> None:
    """Write the predictions of several passages into one file, each array joined over them."""
    joined = {f.name: np.concatenate([getattr(one, f.name) for one in predictions]) for f in fields(Predictions)}
    np.savez(file, **joined, tokens=[len(one.target) for one in predictions])


def load(file: Path) -> list[Predictions]:
    """Read what :func:`save` wrote.

    Raises:
        OSError, ValueError, KeyError, zipfile.BadZipFile: for a damaged file; its checksums tell.
    """
    with np.load(file) as data:
        arrays = {f.name: data[f.name] for f in fields(Predictions)}
        ends = np.cumsum(data["tokens"])
    starts = [0, *ends[:-1]]
    return [
        Predictions(**{name: array[start:end] for name, array in arrays.items()})
        for start, end in zip(starts, ends, strict=True)
    ]
