"""A tiny real model whose widths every kernel takes, and resolved configurations for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from llm_at_home.tasks import resolve

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with widths that are multiples of 64, and SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from llm_at_home.models.embedded import ensure_converted

    tokenizer = AutoTokenizer.from_pretrained(ensure_converted())
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("models") / "wide"
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own that still has the converted embedded model and the published questions."""
    from llm_at_home.paths import cache_dir

    shared = cache_dir()
    own = tmp_path / "cache"
    own.mkdir()
    for name in ("models", "mt_bench"):
        (own / name).symlink_to(shared / name)
    monkeypatch.setenv("LLM_AT_HOME_CACHE", str(own))
    return own


def resolved(command: str, model: Path, *overrides: str) -> dict[str, Any]:
    """The configuration of a command on a local model, resolved and checked as the command itself does."""
    words = ["model=custom", f"model.source={model}", "gpu=cpu", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose(command, words)
    config = resolve.resolve(command, composed, words)
    resolve.check(command, config)
    return config
