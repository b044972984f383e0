"""Resolved configurations of pruning on a small real model, and a cache of the tests' own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from llm_at_home.tasks import resolve

CONF = Path(__file__).resolve().parents[2] / "conf"
# Enough for these tests' widths, and quick.
FEW = ["prune.calibration.limit=4", "prune.calibration.max_length=64"]
# The small model's decoder: two layers of seven matrices.
LAYERS = 14


@pytest.fixture(scope="module")
def small_model(save_llama: Any) -> Path:
    """A model whose widths are multiples of 64, which every quantization takes."""
    return save_llama("small", hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the module's own that still has the converted embedded model."""
    from llm_at_home.paths import cache_dir

    shared, own = cache_dir(), tmp_path_factory.mktemp("cache")
    for name in ("models", "mt_bench"):
        (own / name).symlink_to(shared / name)
    before = os.environ.get("LLM_AT_HOME_CACHE")
    os.environ["LLM_AT_HOME_CACHE"] = str(own)
    yield own
    if before is None:
        del os.environ["LLM_AT_HOME_CACHE"]
    else:
        os.environ["LLM_AT_HOME_CACHE"] = before


def resolved(command: str, model: Path | None, *overrides: str) -> dict[str, Any]:
    """The configuration of a command, resolved and checked as the command itself does; None is the embedded model."""
    source = ["model=custom", f"model.source={model}"] if model else []
    words = [*source, "gpu=cpu", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose(command, words)
    config = resolve.resolve(command, composed, words)
    resolve.check(command, config)
    return config
