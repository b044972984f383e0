"""Fidelity runs on the tiny model, made in this process with a cache of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from llm_at_home.records import store
from llm_at_home.records.schema import Record
from llm_at_home.tasks import evaluate, resolve

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.fixture(scope="session")
def fidelity_config(tiny_model: Path) -> Callable[..., dict[str, Any]]:
    """A resolved configuration of task=fidelity on the tiny model, small, with these overrides."""
    small = ("limit=4", "fidelity.answer_tokens=8", "fidelity.baseline_top_k=64")
    words = ("task=fidelity", "gpu=cpu", "model=custom", f"model.source={tiny_model}", "model.name=tiny", *small)

    def config(*overrides: str) -> dict[str, Any]:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return resolve.resolve("evaluate", compose("evaluate", [*words, *overrides]), [*words, *overrides])

    return config


@pytest.fixture(scope="session")
def fidelity_run(
    tmp_path_factory: pytest.TempPathFactory, fidelity_config: Callable[..., dict[str, Any]]
) -> Callable[..., Path]:
    """``fidelity_run(*overrides)`` is the folder of such a run, made once a session."""
    cache = tmp_path_factory.mktemp("cache")
    made: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str) -> Path:
        if overrides not in made:
            folder = tmp_path_factory.mktemp("fidelity")
            record = Record(task="evaluate", config=fidelity_config(*overrides))
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LLM_AT_HOME_CACHE", str(cache))
                evaluate.run(record.config, folder, record, None)
            store.save(record, folder)
            made[overrides] = folder
        return made[overrides]

    return run
