"""A tiny real model whose widths every kernel takes, and resolved configurations for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from llm_at_home.adapters.attach import prepare_for_training
from llm_at_home.tasks import resolve

CONF = Path(__file__).resolve().parents[2] / "conf"


LORA = {
    "name": "lora",
    "trains": "adapter",
    "_target_": "peft.LoraConfig",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "target_modules": "all-linear",
}


@pytest.fixture(scope="session")
def wide_model(save_llama: Callable[..., Path]) -> Path:
    """A model whose widths are multiples of 64, which every kernel takes."""
    return save_llama("wide", hidden_size=128, intermediate_size=256)


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


def loadable(model: Path, quant: dict[str, Any], dtype: str = "float32", **more: Any) -> dict[str, Any]:
    """What loading a local model needs of a resolved configuration."""
    group = {
        "name": "tiny",
        "source": str(model),
        "revision": None,
        "weights": "pretrained",
        "trust_remote_code": False,
        "use_safetensors": True,
        "chat_template": None,
        "architecture": None,
    }
    return {"model": group, "quant": quant, "dtype": dtype, "gpu": {"name": "cpu", "device": "cpu"}, **more}


def lora_gradients(model: Any, adapter: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The gradients of a LoRA whose second factors are not zero, after a forward pass without gradients."""
    torch.manual_seed(0)
    wrapped = prepare_for_training(model, adapter)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(100, 140).reshape(2, 20)
    with torch.no_grad():
        wrapped(input_ids=ids)  # after which bitsandbytes would repack its weights
    wrapped(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.float() for name, p in wrapped.named_parameters() if p.requires_grad}
