"""Values that a run would stumble over late, or take for something else without a word."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from llm_at_home.errors import Refusal

# Whole numbers and the smallest of each; a callback may be left out, and data= need not have each key.
WHOLE = {
    "data.batch_size": 1,
    "data.max_length": 1,
    "data.conversations": 1,
    "trainer.max_steps": 1,
    "callbacks.checkpoints.every_n_steps": 1,
    "callbacks.checkpoints.keep": 1,
    "callbacks.divergence.window": 1,
    "callbacks.throughput.warmup_steps": 0,
    "adapter.init_r": 1,
    "adapter.target_r": 1,
    "adapter.num_virtual_tokens": 1,
    "adapter.encoder_hidden_size": 1,
    "adapter.bottleneck_size": 1,
    "scheduler.T_0": 1,
    "scheduler.T_mult": 1,
    "scheduler.num_warmup_steps": 0,
    "scheduler.num_decay_steps": 0,
}
# Numbers above zero, at which nothing would be learned and below which the wrong way round.
POSITIVE = ("optimizer.lr", "adapter.lora_alpha", "adapter.alpha")
SHARES = ("adapter.lora_dropout", "adapter.vera_dropout", "adapter.rank_dropout", "adapter.module_dropout")
SWITCHES = ("data.packing", "data.group_by_length", "memory.offload")
# YAML's further words for true and false are plain text to Hydra, and any text is true.
NO_SWITCHES = ("yes", "no", "on", "off")
WORDS = ("trainer.compile", "trainer.graph")  # which are switched off with that word
# Lightning's keys that this project sets itself, and what to use for them.
OWN = {
    "gradient_clip_val": "callbacks.clipping.max_norm",
    "gradient_clip_algorithm": "callbacks.clipping.max_norm",
    "accumulate_grad_batches": "callbacks.accumulation.steps",
    "accelerator": "gpu",
    "callbacks": "callbacks",
    "plugins": "trainer.precision",
    "default_root_dir": "hydra.run.dir",
    "logger": "logger",
    "enable_checkpointing": "callbacks.checkpoints",
    "enable_progress_bar": "callbacks.progress",
}


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether a value is a whole number from ``least`` on; true and false are none."""
    return type(value) is int and value >= least


def check_switches(config: Mapping[str, Any]) -> None:
    """Refuse words for true and false that are neither here.

    Raises:
        Refusal: naming the key.
    """
    for key, value in _values(config):
        if isinstance(value, str) and value.lower() in NO_SWITCHES and key not in WORDS:
            raise Refusal(f"{key}={value} is text here, which would count as true: give true or false")


def check_engine(engine: Mapping[str, Any]) -> None:
    """Refuse numbers of the ``engine`` group that are none.

    Raises:
        Refusal: naming the key and what it takes.
    """
    for key in ("max_new_tokens", "batch_size", "warmup_tokens", "context"):
        if key in engine and not is_whole(engine[key]):
            raise Refusal(f"engine.{key}={engine[key]} is no whole number from 1 on: give at least 1")
    if engine.get("threads") is not None and not is_whole(engine["threads"]):
        raise Refusal(f"engine.threads={engine['threads']} is no whole number from 1 on: give at least 1, or null")
    temperature = engine.get("temperature")
    if temperature is not None and not (type(temperature) in (int, float) and 0 <= temperature < math.inf):
        raise Refusal(f"engine.temperature={temperature} is no temperature: give 0 (greedy) or more, or null")


def check_values(config: Mapping[str, Any]) -> None:
    """Refuse numbers and switches of ``conf/train.yaml`` that are none.

    Raises:
        Refusal: naming the key and what it takes.
    """
    given = dict(_values(config))
    for key, least in WHOLE.items():
        if key in given and not is_whole(given[key], least):
            raise Refusal(f"{key}={given[key]} is no whole number that can be: give at least {least}")
    # OFT's is 0 where the size of its blocks is given.
    is_oft = str(given.get("adapter._target_")).endswith("OFTConfig")
    if "adapter.r" in given and not is_oft and not is_whole(given["adapter.r"]):
        raise Refusal(f"adapter.r={given['adapter.r']} is no rank: give a whole number of at least 1")
    for key in POSITIVE:
        if key in given and not (type(given[key]) in (int, float) and 0 < given[key] < math.inf):
            raise Refusal(f"{key}={given[key]} is no number above 0, with which nothing is learned: give one")
    for key in SHARES:
        if key in given and not (type(given[key]) in (int, float) and 0 <= given[key] < 1):
            raise Refusal(f"{key}={given[key]} is no share to drop: give 0 or more, and less than 1")
    decay = given.get("optimizer.weight_decay", 0)
    if not (type(decay) in (int, float) and 0 <= decay < math.inf):
        raise Refusal(f"optimizer.weight_decay={decay} is no weight decay: give 0 or more")
    for key in SWITCHES:
        if key in given and not isinstance(given[key], bool):
            raise Refusal(f"{key}={given[key]} is no switch: give true or false")
    norm = given.get("callbacks.clipping.max_norm")
    if norm is not None and not (isinstance(norm, (int, float)) and norm > 0):
        raise Refusal(
            f"callbacks.clipping.max_norm={norm} clips nothing: give a positive number, or ~callbacks.clipping"
        )
    epochs = given.get("trainer.max_epochs")
    if epochs is not None and (type(epochs) is not int or (epochs < 1 and epochs != -1)):
        raise Refusal(f"trainer.max_epochs={epochs} leaves nothing to train: give at least 1, or -1 for no limit")
    for key in OWN:
        if key in config["trainer"]:
            raise Refusal(f"trainer.{key} is set by the run itself: use {OWN[key]}")
    _check_decay(config["scheduler"])


def _check_decay(scheduler: Mapping[str, Any] | None) -> None:
    if not scheduler or not str(scheduler.get("_target_")).endswith("get_wsd_schedule"):
        return
    parts = {key: scheduler.get(key) or 0 for key in ("num_warmup_steps", "num_decay_steps")}
    steps = scheduler.get("num_training_steps")
    if steps is not None and sum(parts.values()) > steps:
        words = " and ".join(f"scheduler.{key}={value}" for key, value in parts.items() if value)
        hint = f"give at most {steps} together"
        raise Refusal(
            f"{words} do not fit trainer.max_steps={steps}, so that the rate would begin on its way down: {hint}"
        )


def _values(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no group, by its dotted key."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _values(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
