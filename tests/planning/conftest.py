"""Composed configurations, and passes of small random models whose memory is counted as a GPU's allocator would."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CONF = Path(__file__).resolve().parents[2] / "conf"
SMALL = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8}


BLOCK = 512  # to whose multiples torch's allocator rounds up on a GPU


class Alive(TorchDispatchMode):
    """While it is entered: ``now`` and ``peak``, in bytes of storages made since; views of others count nothing."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {}

    def _watch(self, tensor, is_new):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            size = -(-storage.nbytes() // BLOCK) * BLOCK if is_new else 0
            self._sizes[key] = size
            self.now += size
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key):
        self.now -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor, is_new=False)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor, is_new=True)
        self.peak = max(self.peak, self.now)
        return result


@pytest.fixture
def plain():
    """``plain("train", *overrides)``: a configuration as plain values, its dtype decided, for a GPU."""

    def make(command: str, *overrides: str) -> dict[str, Any]:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config: Any = OmegaConf.to_container(compose(command, list(overrides)), resolve=True)
        if config.get("dtype") == "auto":
            config["dtype"] = "bfloat16"
        return config

    return make


@dataclass
class Pass:
    """What one forward and backward pass took, in bytes beside what was there before.

    Attributes:
        kept: alive when the forward pass is over.
        peak: the most that was alive, forth or back.
        trainable: parameters that take gradients.
    """

    kept: int
    peak: int
    trainable: int


@pytest.fixture
def measure(plain):
    """``measure(layers, rows, tokens, *overrides)``: the configuration, and a real pass through a small random Llama.

    It computes on the CPU as on a GPU: PEFT asks whether CUDA's autocast is on, and takes another path where it is not.
    """
    from llm_at_home.adapters.attach import prepare_for_training, trainable_parameters
    from llm_at_home.quantization.base import load_base
    from llm_at_home.training.activations import ChunkedLoss, checkpoint_layers
    from llm_at_home.training.module import CausalLMModule

    def run(layers: int, rows: int, tokens: int, *overrides: str, padded: bool = False, **shape: int):
        sizes = {**SMALL, "num_key_value_heads": 8, **shape, "num_hidden_layers": layers}
        words = ["model=llama2_7b", "model.weights=random", "data=synthetic", f"data.batch_size={rows}"]
        words += [f"data.max_length={tokens}", *(f"model.architecture.{key}={value}" for key, value in sizes.items())]
        config = plain("train", *words, *overrides)
        wide = config["dtype"] == "float32"
        base = load_base({**config, "gpu": {"device": "cpu"}})
        model = prepare_for_training(base, config["adapter"], None, 20)
        checkpoint_layers(model, config["memory"]["checkpointing"])
        at_once = config["memory"]["loss_tokens"]
        chunked = ChunkedLoss(model, at_once) if at_once else None
        module = CausalLMModule(model, lambda parameters: None, None, chunked)
        ids = torch.randint(0, sizes["vocab_size"], (rows, tokens))
        batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
        if padded:
            batch["attention_mask"][0, -3:] = 0
        for _ in range(2):  # gradients are there from the second pass on
            gc.collect()
            torch.set_autocast_enabled("cuda", not wide)
            try:
                with Alive() as alive:
                    with torch.autocast("cpu", torch.bfloat16, enabled=not wide, cache_enabled=False):
                        loss = module._loss(batch)
                    kept = alive.now
                    loss.backward()
            finally:
                torch.set_autocast_enabled("cuda", False)
        return config, Pass(kept, alive.peak, trainable_parameters(model))

    return run
