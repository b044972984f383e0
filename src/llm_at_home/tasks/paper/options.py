"""What ``make paper`` was asked for: its own options of ``conf/paper.yaml``, and overrides that go to the runs."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from llm_at_home.errors import Refusal
from llm_at_home.planning import composing
from llm_at_home.planning.composing import CONF, one_line

FILE = CONF / "paper.yaml"
DRY_RUN = "--dry-run"
PUBLISHED = "published"
FOLDERS = ("adapter_path", "answers", "baseline")
# What tells one row from another is a row's own.
ROWS_OWN = ("quant", "adapter", "prune", "experiment", *FOLDERS)


@dataclass(frozen=True)
class Options:
    """The options of a command.

    Attributes:
        values: ``conf/paper.yaml`` with what the user changed.
        overrides: words for the runs.
    """

    values: dict[str, Any]
    overrides: tuple[str, ...]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None

    def named(self, key: str) -> str | None:
        """The value that the user gave to a key of the runs, or None."""
        found = [word.partition("=")[2] for word in self.overrides if word.partition("=")[0] == key]
        return found[-1] if found else None


def read(words: Sequence[str]) -> Options:
    """The options of a command line.

    Raises:
        Refusal: for words that are no overrides, values that make no sense, and keys that the rows decide.
    """
    words = ["dry_run=true" if word == DRY_RUN else word for word in words]
    wrong = [word for word in words if "=" not in word]
    if wrong:
        raise Refusal(f"{wrong[0]} is no override: give key=value, or {DRY_RUN}")
    own = [word for word in words if _is_own(_key(word))]
    overrides = tuple(word for word in words if word not in own)
    for word in overrides:
        if _key(word).split(".")[0] in ROWS_OWN and "." not in _key(word):
            raise Refusal(f"{word} is what a row decides: choose rows, such as rows=[nf4,q_lora]")
    try:
        # Not Hydra, to which judge= would be a group.
        merged = OmegaConf.merge(_defaults(), OmegaConf.from_dotlist(own))
    except (OmegaConfBaseException, YAMLError) as error:
        raise Refusal(one_line(error)) from error
    values: Any = OmegaConf.to_container(merged, resolve=True)
    return _checked(Options(values, overrides))


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _defaults() -> DictConfig:
    found = OmegaConf.load(FILE)
    assert isinstance(found, DictConfig)
    OmegaConf.set_struct(found, True)
    return found


def _is_own(key: str) -> bool:
    """Whether a key is of ``conf/paper.yaml``; below ``judge`` there are only the runs' keys."""
    return key.split(".")[0] in _defaults() and not key.startswith("judge.")


def _checked(options: Options) -> Options:
    rows = [*options.inference, *options.finetuning]
    for key in ("dry_run", "full"):
        if type(options.values[key]) is not bool:
            raise Refusal(f"{key}={options.values[key]} is neither true nor false")
    if options.rows == PUBLISHED:
        options = dataclasses.replace(options, values={**options.values, "rows": options.published})
    if options.rows is not None and not isinstance(options.rows, list):
        raise Refusal(f"rows={options.rows} is no list: give rows=[{options.rows}], or rows={PUBLISHED}")
    for name in options.rows or []:
        if name not in rows:
            raise Refusal(f"rows: {name} is unknown: choose among {', '.join(rows)}")
    if options.protocol not in ("auto", *options.protocols):
        raise Refusal(f"protocol={options.protocol} is unknown: choose auto, {', '.join(options.protocols)}")
    minutes = options.minutes
    if minutes is not None and not (type(minutes) in (int, float) and minutes > 0):
        raise Refusal(f"minutes={minutes} leaves no time to start a run: give a number above 0, or null")
    judges = sorted(file.stem for file in (CONF / "judge").glob("*.yaml"))
    if options.judge not in ("auto", *judges):
        raise Refusal(f"judge={options.judge} is unknown: choose auto, {', '.join(judges)}")
    for key in ("chat_source", "base_source", "out", "study"):
        if options.values[key] is not None and not isinstance(options.values[key], str):
            raise Refusal(f"{key}={options.values[key]} is no folder's name: give one")
    if options.out is not None:
        composing.check_place(f"out={options.out}", Path(options.out))
    return options


def composed(command: str, words: Sequence[str]) -> DictConfig:
    """The configuration of a command.

    Composing takes a fifth of a second, so runs that differ in the folders that they name alone share it.

    Raises:
        Refusal: for what Hydra cannot compose, in one line.
    """
    folders = [word for word in words if word.partition("=")[0] in FOLDERS]
    config = copy.deepcopy(_composed(command, tuple(word for word in words if word not in folders)))
    for word in folders:
        key, _, value = word.partition("=")
        OmegaConf.update(config, key, value)
    return config


@functools.cache
def _composed(command: str, words: tuple[str, ...]) -> DictConfig:
    return composing.composed(command, words)
