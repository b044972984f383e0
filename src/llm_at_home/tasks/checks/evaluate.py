"""What cannot be evaluated, or not so that it would mean anything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_at_home.data.sources import SYNTHETIC, check_group
from llm_at_home.errors import Refusal
from llm_at_home.evaluation import context, fidelity, judge
from llm_at_home.hardware.device import resolve_dtype
from llm_at_home.records import store
from llm_at_home.tasks import harness, judging
from llm_at_home.tasks.checks.values import check_engine, is_whole


def check(config: Mapping[str, Any]) -> None:
    """Refuse an evaluation that cannot work."""
    if config["task"] in ("judge", "judge_check"):
        _check_judge(config)
    elif config["model"]["weights"] == "random":
        raise Refusal("random weights have no quality to measure: use model.weights=pretrained")
    elif config["task"] == "fidelity":
        resolve_dtype(config["fidelity"]["baseline_dtype"], config["gpu"])
        fidelity.check(config)
    elif config["task"] == "harness":
        harness.check(config)
    elif config["data"]["source"] == SYNTHETIC:
        raise Refusal("data=synthetic has no answers to compare with: use data=handbook, guanaco or jsonl")
    else:
        for key in ("batch_size", "max_new_tokens"):
            if not is_whole(config["text"][key]):
                raise Refusal(f"text.{key}={config['text'][key]} is no whole number from 1 on: give at least 1")
        check_engine(config["engine"])
        context.check(config)
        check_group(config["data"], ("test",), config["seed"])


def _check_judge(config: Mapping[str, Any]) -> None:
    places = judging.answer_folders(config)
    if config["task"] == "judge" and not places:
        raise Refusal("task=judge needs answers=RUN_FOLDER, or a file of answers in FastChat's format")
    if not config.get("questions") and (not places or Path(places[0]).is_file()):
        raise Refusal("which questions? Add questions=mt_bench, or questions=home_bench")
    if config.get("questions") and config["questions"]["source"] == SYNTHETIC:
        raise Refusal("questions=synthetic are random ids, which nobody can judge: use questions=mt_bench")
    for place in (*places, config["baseline"], config.get("own_answers")):
        if not place or Path(place).is_file():
            continue
        run = store.load(place)
        if run.task != "infer":
            raise Refusal(f"answers and baseline are folders of inference runs, but one holds a {run.task} record")
        if run.config["model"]["weights"] == "random":
            raise Refusal("answers of random weights have no quality to judge: use model.weights=pretrained")
    if config["task"] == "judge":
        judge.check(config["judge"], has_baseline=bool(config["baseline"]), runs=len(places))
        return
    if bool(places) != bool(config["baseline"]) or len(places) > 1:
        raise Refusal(
            "task=judge_check compares one model under two seeds: give answers=RUN and baseline=OTHER_SEED, or neither"
        )
    if places and not judging.differ_in_seed_alone(places[0], config["baseline"]):
        raise Refusal(
            "answers and baseline are not one model under two seeds: the noise floor needs infer.py -m seed=0,1"
        )
    judge.check({**config["judge"], "mode": "single"})
