"""What the group ``judge`` means: its refusals, its key, its templates, and what of it can change a judgment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llm_at_home.errors import Refusal

if TYPE_CHECKING:
    from llm_at_home.evaluation.judge.prompts import Templates

MODES = ("single", "pairwise", "both", "all_pairs")
RATINGS = ("reply", "expected")
_LEAST: tuple[tuple[str, float], ...] = (
    ("max_tokens", 1),
    ("timeout_s", 0.001),
    ("max_retries", 0),
    ("concurrency", 1),
    ("repeats", 1),
    ("requests_per_minute", 1),
    ("tokens_per_minute", 1),
    ("max_cost_usd", 0),
)


def check(config: Mapping[str, Any], has_baseline: bool = False, runs: int = 1) -> None:
    """Refuse what cannot work, before anything is loaded or asked.

    Args:
        config: the group ``judge`` as plain values.
        has_baseline: whether there are answers to compare with.
        runs: how many sets of answers are to be judged.

    Raises:
        Refusal: with one line that says what to change; it never holds a key.
    """
    name, mode = config["name"], config["mode"]
    if mode not in MODES:
        raise Refusal(f"judge.mode={mode} is unknown: choose one of {', '.join(MODES)}")
    if mode in ("pairwise", "both") and not has_baseline:
        raise Refusal(f"judge.mode={mode} compares two runs: give the other one as baseline=RUN_FOLDER")
    if (mode == "all_pairs") != (runs > 1):
        raise Refusal("judge.mode=all_pairs compares several runs, and only it does: answers=[RUN_A,RUN_B,...]")
    if not config.get("model"):
        raise Refusal(f"judge={name} needs judge.model=NAME, the exact name that the server knows")
    for key, least in _LEAST:
        if config.get(key) is not None and config[key] < least:
            raise Refusal(f"judge.{key}={config[key]} is too small: the least is {least}")
    _check_rating(config)
    _check_budget(config)
    _check_server(config)
    api_key(config)
    templates(config)


def embedded(config: Mapping[str, Any]) -> bool:
    """Whether this judge brings its own server: its config names a model file and no address."""
    return config.get("base_url") is None and "gguf" in config


def api_key(config: Mapping[str, Any]) -> str | None:
    """The key out of the environment variable that the config names.

    Raises:
        Refusal: when it is not there, or no key.
    """
    variable = config.get("api_key_env")
    if variable is None or embedded(config):
        return None
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        # Not repeated in the message: it may be the key itself.
        raise Refusal("judge.api_key_env must be the NAME of an environment variable, never the key itself")
    key = os.environ.get(variable, "").strip()
    if not key:
        raise Refusal(
            f"judge={config['name']} needs a key in the environment variable {variable}: "
            f"export {variable}=..., or use judge=local, which needs none"
        )
    if not (key.isascii() and key.isprintable()):
        raise Refusal(f"the key in {variable} holds characters that no HTTP header can carry")
    return key


def templates(config: Mapping[str, Any]) -> Templates:
    """The judge templates: the published ones, or those of the config's file."""
    from llm_at_home.evaluation.judge.prompts import Templates, default_path

    return Templates(Path(config["templates"]) if config.get("templates") else default_path())


def setup(config: Mapping[str, Any]) -> dict[str, Any]:
    """What, beside the prompt, can change a judgment: the judge's snapshot and every parameter that is sent."""
    names = ("model", "temperature", "max_tokens", "extra_body", "context", "rating", "grammar")
    chosen = {name: config.get(name) for name in names}
    if embedded(config):
        from llm_at_home.evaluation.judge.local import find_gguf
        from llm_at_home.records.hashing import file_hash

        return {**chosen, "gguf": file_hash(find_gguf(config["gguf"]))}
    return {**chosen, "base_url": config.get("base_url")}


def grammar(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The request's field for the grammar of this kind of grading, where there is one."""
    chosen = (config.get("grammar") or {}).get(kind)
    return {"grammar": chosen} if chosen else {}


def label(config: Mapping[str, Any]) -> str:
    """The judge's name in a reading's method, with the model beside it where it does not answer freely."""
    if config.get("rating") == "expected":
        return f"{config['name']}[{config['model']}, expected rating]"
    if config.get("grammar"):
        return f"{config['name']}[{config['model']}, grammar]"
    return str(config["name"])


def _check_rating(config: Mapping[str, Any]) -> None:
    rating = config.get("rating", "reply")
    if rating not in RATINGS:
        raise Refusal(f"judge.rating={rating} is unknown: choose one of {', '.join(RATINGS)}")
    if config.get("batch") and rating == "expected":
        raise Refusal("judge.rating=expected reads probabilities, which batches do not give: use judge.batch=false")
    if config.get("batch") and embedded(config):
        raise Refusal("judge=local has no Batch API: use judge.batch=false")


def _check_budget(config: Mapping[str, Any]) -> None:
    if config.get("max_cost_usd") is None:
        return
    prices = config.get("prices") or {}
    if prices.get("input") is None or prices.get("output") is None:
        raise Refusal("judge.max_cost_usd needs prices: give judge.prices.input and judge.prices.output")
    if config.get("max_tokens") is None:
        raise Refusal("judge.max_cost_usd needs judge.max_tokens, or a reply could cost anything")


def _check_server(config: Mapping[str, Any]) -> None:
    if embedded(config):
        from llm_at_home.evaluation.judge.local import find_gguf

        find_gguf(config["gguf"])
        return
    address = urlsplit(config.get("base_url") or "")
    if address.scheme not in ("http", "https") or not address.hostname:
        raise Refusal(f"judge={config['name']} needs judge.base_url=http://HOST:PORT/v1")
    if address.username or address.password or address.query:
        raise Refusal("judge.base_url must not hold a key: name its environment variable in judge.api_key_env")
