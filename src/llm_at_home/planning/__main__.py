"""``python -m llm_at_home.planning [group=choice] [key=value]`` prints what a run takes of a GPU, and runs nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llm_at_home.errors import Refusal
from llm_at_home.hardware.catalogue import Card, is_card, load_catalogue
from llm_at_home.hardware.present import present_gpus
from llm_at_home.planning import advice, advice_text, composing, values
from llm_at_home.planning.plan import ANY_CAPABILITY, Target, make
from llm_at_home.planning.text import as_text, as_values

OUTPUTS = ("table", "json")
EXIT_REFUSED = 2
# What a machine without a GPU of NVIDIA's can do instead.
ON_CPU = {
    advice.CHAT: "on the CPU llama.cpp answers, python infer.py mode=chat quant=gguf quant.path=FILE.gguf",
    advice.FINETUNE: "on the CPU a small model trains, python train.py experiment=handbook",
}


def target_of(gpu: dict[str, Any]) -> Target:
    """What ``gpu=`` means to the planner: any card of the catalogue, present or not, or the one that is present.

    A present one whose name the catalogue knows is that card, with the memory that it has here.

    Raises:
        Refusal: for the CPU.
    """
    if is_card(gpu):
        return Target.of(Card.from_config(gpu))
    if gpu["device"] == "cpu":
        raise Refusal("the planner predicts the memory of a GPU: name one, such as gpu=rtx4090")
    present = present_gpus()
    if present:
        known = next((card for card in load_catalogue().values() if card.title == present[0].name), None)
        if known is not None and not present[0].mig:
            return Target.of(replace(known, memory=present[0].memory or known.memory))
        return Target(gpu["name"], present[0].memory, present[0].compute_capability)
    if gpu["device"] == "cuda":
        raise Refusal("gpu=cuda is the GPU that is present, and none is: name a card, such as gpu=rtx4090")
    return Target(gpu["name"], None, ANY_CAPABILITY)


def answer(composed: DictConfig, named: Collection[str] = ()) -> str:
    """The plan of a composed configuration, or for ``task=chat`` and ``task=finetune`` what to choose.

    Args:
        composed: of ``conf/plan.yaml``.
        named: the keys that the user gave.

    Raises:
        Refusal: with one line that says what to change.
    """
    try:
        config: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise Refusal(str(error).splitlines()[0]) from error
    if config["out"] not in OUTPUTS:
        raise Refusal(f"out={config['out']} is unknown: choose one of {', '.join(OUTPUTS)}")
    if config["model"]["name"] is None:
        config["model"]["name"] = str(config["model"]["source"]).rstrip("/").rpartition("/")[2]
    values.check(config)
    if config["gpu"]["device"] == "cpu" and config["task"] in ON_CPU:
        raise Refusal(f"what is compared needs a GPU: name one, such as gpu=rtx4090; {ON_CPU[config['task']]}")
    target, cards = target_of(config["gpu"]), list(load_catalogue().values())
    if config["task"] in advice.TASKS:
        found = advice.advise(config, target, cards, named)
        shown = advice_text.as_text(found) if config["out"] == "table" else advice_text.as_values(found)
    else:
        plan = make(config, target, cards)
        shown = as_text(plan) if config["out"] == "table" else as_values(plan)
    return shown if isinstance(shown, str) else json.dumps(shown, indent=1)


@hydra.main(version_base="1.3", config_path="../../../conf", config_name="plan")
def with_flags(config: DictConfig) -> None:
    """Print the plan where Hydra's own flags are used, such as --help and --cfg."""
    print(answer(config))


def main() -> None:
    """Print the plan; exit code 2 where it is refused."""
    words = sys.argv[1:]
    try:
        if any(word.startswith("-") for word in words):
            with_flags()
        else:
            print(answer(composing.composed("plan", words), {word.partition("=")[0].lstrip("+~") for word in words}))
    except Refusal as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)


if __name__ == "__main__":
    main()
