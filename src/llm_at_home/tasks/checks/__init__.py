"""Refuses, before anything loads, what cannot work: what all tasks share here, and a file for each kind of task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_at_home.adapters.attach import adapter_folder
from llm_at_home.errors import Refusal
from llm_at_home.models import source
from llm_at_home.pruning import base as pruning
from llm_at_home.quantization import base
from llm_at_home.tasks.checks import evaluate, infer, making, train
from llm_at_home.tasks.checks.values import check_switches

SEEDS = 2**32  # that numpy takes


def _check_times(config: Mapping[str, Any]) -> None:
    timeout, grace = config["timeout_s"], config["grace_s"]
    if timeout is not None and not (type(timeout) in (int, float) and timeout > 0):
        raise Refusal(f"timeout_s={timeout} is no time to end a job after: give seconds, or null for none")
    if not (type(grace) in (int, float) and grace >= 0):
        raise Refusal(f"grace_s={grace} is no time to leave a job: give seconds, 0 for none")


def _check_data(config: Mapping[str, Any]) -> None:
    """Refuse a file that another source than ``jsonl`` would leave unread."""
    data = config.get("data")
    for key in ("path", "test_path"):
        if data and data["source"] != "jsonl" and data.get(key):
            raise Refusal(f"data.{key}={data[key]} is not read with data={data['name']}: add data=jsonl")


def check(task: str, config: Mapping[str, Any]) -> None:
    """Refuse, before anything loads, what cannot work.

    Raises:
        Refusal: with one line that says what to change.
    """
    limit, seed = config["limit"], config["seed"]
    if limit is not None and (type(limit) is not int or limit < 1):
        raise Refusal(f"limit={limit} leaves nothing to do: give at least 1, or null for all")
    if type(seed) is not int or not 0 <= seed < SEEDS:
        raise Refusal(f"seed={seed} is no seed: give a whole number from 0 to {SEEDS - 1}")
    _check_times(config)
    check_switches(config)
    _check_data(config)
    if config.get("adapter_path"):
        adapter_folder(config["adapter_path"])
    if "model" in config:
        source.check(config["model"])
        if "quant" in config:
            base.check(config)
        pruning.check(config)
    checks = {
        "train": train.check,
        "infer": infer.check,
        "evaluate": evaluate.check,
        "quantize": making.check_quantize,
        "prune": making.check_prune,
        "merge": making.check_merge,
    }
    checks[task](config)
