"""What a saved adapter that is to go on training says of itself, taken over by the configuration or held against it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from llm_at_home.adapters.attach import OWN_KEYS, adapter_folder
from llm_at_home.errors import Refusal

# PEFT's types and the choices of conf/adapter; LoRA's further ones are told by their keys.
CHOICES = {
    "LORA": "lora",
    "ADALORA": "adalora",
    "LOKR": "lokr",
    "LOHA": "loha",
    "OFT": "oft",
    "VERA": "vera",
    "IA3": "ia3",
    "BOTTLENECK": "bottleneck",
    "LN_TUNING": "layernorm",
    "PROMPT_TUNING": "prompt",
    "PREFIX_TUNING": "prefix",
    "P_TUNING": "p_tuning",
}
CLASSES = {
    "LNTuningConfig": "layernorm",
    "PromptTuningConfig": "prompt",
    "PrefixTuningConfig": "prefix",
    "PromptEncoderConfig": "p_tuning",
}
NOT_SAVED = (*OWN_KEYS, "_target_", "task_type")


def complete(config: dict[str, Any], named: Collection[str]) -> None:
    """Take over the settings of the adapter in ``adapter_path``, where the user named no others.

    Args:
        config: of a training run, being resolved; its ``adapter`` group is changed.
        named: the keys that the user gave.

    Raises:
        Refusal: for an adapter of another method than ``adapter=`` says, or of other settings than the user named, or
            one that cannot go on training.
    """
    path = config["adapter_path"]
    if not path or config["adapter"]["trains"] != "adapter":
        return
    saved = json.loads((adapter_folder(path) / "adapter_config.json").read_text(encoding="utf-8"))
    group = dict(config["adapter"])
    found, asked = _choice(CHOICES.get(str(saved.get("peft_type"))), saved), _choice(_of_class(group), group)
    if found and asked and found != asked:
        raise Refusal(f"adapter_path={path} is of adapter={found} and not of {asked}: use adapter={found}")
    if found in ("prompt", "prefix", "p_tuning"):
        raise Refusal(f"adapter={found} cannot go on from adapter_path, which PEFT only loads for use: use resume=")
    if found == "adalora":
        raise Refusal(
            "adapter=adalora hands out its ranks over one run, and cannot go on from adapter_path: use resume="
        )
    for key in group:
        if key in NOT_SAVED or key not in saved or _same(group[key], saved[key]):
            continue
        if f"adapter.{key}" in named:
            raise Refusal(f"adapter_path={path} has {key}={saved[key]} and not {group[key]}: leave out adapter.{key}")
        group[key] = sorted(saved[key]) if isinstance(saved[key], list) else saved[key]
    config["adapter"] = group


def _of_class(group: Mapping[str, Any]) -> str | None:
    name = str(group.get("_target_")).rpartition(".")[2]
    return CLASSES.get(name) or CHOICES.get(name.removesuffix("Config").upper())


def _choice(choice: str | None, keys: Mapping[str, Any]) -> str | None:
    if choice != "lora":
        return choice
    further = {
        "dora": keys.get("use_dora"),
        "rslora": keys.get("use_rslora"),
        "lora_pissa": str(keys.get("init_lora_weights")).startswith("pissa"),
    }
    return next((name for name, holds in further.items() if holds), choice)


def _same(asked: Any, saved: Any) -> bool:
    if isinstance(asked, list) and isinstance(saved, list):
        return sorted(asked) == sorted(saved)
    return bool(asked == saved)
