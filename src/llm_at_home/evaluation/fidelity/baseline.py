"""The unquantized model that others are held against: its answers and predictions, made once and kept."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llm_at_home.evaluation.fidelity.passages import Passage, passages_hash
from llm_at_home.evaluation.fidelity.predictions import Predictions, load, predict, save
from llm_at_home.hardware.device import resolve_dtype
from llm_at_home.models import source
from llm_at_home.quantization.base import load_base
from llm_at_home.records.cached import cached, key_hash
from llm_at_home.records.hashing import package_versions

log = logging.getLogger(__name__)

KIND = "baselines"
ANSWERS, PREDICTIONS = "answers.json", "predictions.npz"
# The model's own distribution, unchanged: the KL divergence along answers drawn from it is then an unbiased estimate of
# the divergence between whole answers (the chain rule), and two seeds give two independent draws.
TEMPERATURE = 1.0
DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)

T = TypeVar("T")


class Baseline:
    """The dense model of a configuration, loaded only where something is not in the cache yet.

    Args:
        config: a resolved configuration of ``task=fidelity``.
        tokenizer: the model's.
    """

    def __init__(self, config: Mapping[str, Any], tokenizer: Any) -> None:
        dense = {"name": "none", "method": "dense", "bits": None}
        dtype = resolve_dtype(config["fidelity"]["baseline_dtype"], config["gpu"])
        model = dict(config["model"])
        if config["fidelity"]["baseline_source"]:
            model |= {"source": config["fidelity"]["baseline_source"], "revision": None}
        self._config = {**config, "model": model, "quant": dense, "dtype": dtype}
        self._tokenizer = tokenizer
        self._model: Any = None

    def answers(self, prompts: Sequence[list[int]], max_tokens: int, seed: int) -> list[Passage]:
        """The baseline's sampled answers to ``prompts``, an answer's tokens counting and its prompt's not.

        Args:
            prompts: token ids, answered in one batch.
            max_tokens: of an answer.
            seed: of the sampling.
        """
        asked = passages_hash([Passage(prompt) for prompt in prompts])
        key = self._key(prompts=asked, max_tokens=max_tokens, seed=seed, temperature=TEMPERATURE)

        def make(folder: Path) -> None:
            from llm_at_home.generation.eager import EagerEngine
            from llm_at_home.generation.reply import Sampling

            engine = EagerEngine(self._load(), self._tokenizer, max_tokens)
            replies = engine.reply_batch(prompts, Sampling(max_tokens, TEMPERATURE, seed))
            (folder / ANSWERS).write_text(json.dumps([reply.tokens for reply in replies]))

        tokens = _made_and_read(key, make, lambda folder: json.loads((folder / ANSWERS).read_text()))
        return [Passage([*prompt, *answer], first=len(prompt)) for prompt, answer in zip(prompts, tokens, strict=True)]

    def predictions(self, passages: Sequence[Passage], k: int) -> tuple[list[Predictions], str]:
        """The baseline's predictions of each passage, and a hash of all that they depend on."""
        key = self._key(passages=passages_hash(passages), top_k=k)

        def make(folder: Path) -> None:
            model = self._load()
            save([predict(model, passage, k) for passage in passages], folder / PREDICTIONS)

        return _made_and_read(key, make, lambda folder: load(folder / PREDICTIONS)), key_hash(key)

    def release(self) -> None:
        """Give back the model's memory."""
        import torch

        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self) -> Any:
        if self._model is None:
            self._model = load_base(self._config)
        return self._model

    def _key(self, **settings: Any) -> dict[str, Any]:
        config = self._config
        return {
            "model": source.identity(config["model"]),
            "dtype": config["dtype"],
            "device": [config["gpu"]["device"], config["gpu"]["card"]],
            "versions": package_versions(),
            **settings,
        }


def _made_and_read(key: Mapping[str, Any], make: Callable[[Path], None], read: Callable[[Path], T]) -> T:
    """What ``make`` left in the cache; a file that a full disk or a bad block damaged is made again, once."""
    from filelock import FileLock

    folder = cached(KIND, key, make)
    try:
        return read(folder)
    except DAMAGED:
        with FileLock(f"{folder}.mend.lock"):
            folder = cached(KIND, key, make)
            try:
                return read(folder)  # another process may have mended it by now
            except DAMAGED as error:
                log.warning("%s is damaged (%s) and is made again", folder, type(error).__name__)
                shutil.rmtree(folder, ignore_errors=True)
                return read(cached(KIND, key, make))
