"""What a plan cannot be made of: groups that are missing and sizes that are no numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_at_home.errors import Refusal

# Whole numbers from 1 up, by group and key.
WHOLE = (
    *(("data", "batch_size"), ("data", "max_length"), ("trainer", "max_steps")),
    *(("engine", "batch_size"), ("engine", "max_new_tokens"), ("questions", "prompt_tokens")),
)
NEEDED = ("model", "quant", "adapter", "data", "questions", "engine", "trainer", "optimizer", "memory", "gpu")
ACCUMULATION = "callbacks.accumulation.steps"


def check(config: Mapping[str, Any]) -> None:
    """Refuse values that the arithmetic of a plan would stumble over.

    Raises:
        Refusal: naming the key and what it takes.
    """
    for group in NEEDED:
        if not isinstance(config.get(group), Mapping):
            raise Refusal(f"{group}={config.get(group)} leaves the planner without a group: choose one of conf/{group}")
    for group, key in WHOLE:
        if key in config[group]:
            _whole(f"{group}.{key}", config[group][key])
    _check_accumulation(config)
    for key in ("r", "init_r", "target_r", "num_virtual_tokens"):
        if key in config["adapter"] and not str(config["adapter"].get("_target_")).endswith("OFTConfig"):
            _whole(f"adapter.{key}", config["adapter"][key])
    every = config["memory"]["checkpointing"]
    if every not in ("none", "full"):
        _whole("memory.checkpointing", every, "none, full, or a number of layers")
    if config["memory"]["loss_tokens"] is not None:
        _whole("memory.loss_tokens", config["memory"]["loss_tokens"])
    prune = config.get("prune") or {"name": "none"}
    if prune.get("kernel") == "semi_structured":
        raise Refusal("the planner does not know what prune.kernel=semi_structured takes: use prune.kernel=dense")


def _check_accumulation(config: Mapping[str, Any]) -> None:
    steps = ((config.get("callbacks") or {}).get("accumulation") or {}).get("steps", 1)
    if not isinstance(steps, Mapping):
        _whole(ACCUMULATION, steps)
        return
    if not steps:
        raise Refusal(f"{ACCUMULATION} is an empty schedule: give a number, or {{0: 8, 100: 4}}")
    for count in steps.values():
        _whole(ACCUMULATION, count)


def _whole(name: str, value: Any, what: str = "a whole number") -> None:
    if type(value) is not int or value < 1:
        raise Refusal(f"{name}={value} makes no plan: give {what} of at least 1")
