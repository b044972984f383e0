"""Composing a command's configuration without running the command, what Hydra cannot compose being one line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from llm_at_home.errors import Refusal

CONF = Path(__file__).resolve().parents[3] / "conf"
OWN_CARD = (
    "(another card of NVIDIA's: the nearest of these with your memory in GB, such as gpu=rtx3060 gpu.memory=6.2; "
    "without one gpu=cpu)"
)
# Hydra's own advice to programmers, which is no part of what is wrong.
ADVICE = ("Set the env", "Config search", "provider=", "To append", "full_key", "object_type", "reference_type")
PLACES = ("hydra.run.dir", "hydra.sweep.dir", "paths.output")  # that a command writes to


def check_words(words: Sequence[str]) -> None:
    """Refuse what Hydra would end on with a traceback, or with its grammar and no word of what to change.

    Args:
        words: of the command line; those without a ``=`` are left to Hydra.

    Raises:
        Refusal: for a value that needs quotes, a group that is null, and a folder that cannot be made.
    """
    parser = OverridesParser.create()
    for word in words:
        key, _, value = word.partition("=")
        if word.startswith("-") or not value:
            continue
        try:
            override = parser.parse_override(word)
            found = None if override.is_sweep_override() else override.value()
        except HydraException:
            hint = "quote each text in it that is not of letters, digits and /._-"
            if value.startswith("="):
                hint = "give one ="
            elif not value.startswith(("[", "{", '"', "'")):
                hint = f"quote the value, twice for the shell: '{key}=\"{value}\"'"
            raise Refusal(f"{word} cannot be read: {hint}") from None
        if value == "null" and (CONF / key.lstrip("+")).is_dir():
            raise Refusal(f"{word} chooses nothing: leave it out, or choose one of conf/{key.lstrip('+')}")
        if key in PLACES and isinstance(found, str) and "${" not in found:
            check_place(word, Path(found))


def check_place(word: str, folder: Path) -> None:
    """Refuse a folder that cannot be made or written to.

    Raises:
        Refusal: naming ``word``, which asked for it.
    """
    there = next((place for place in (folder, *folder.absolute().parents) if place.exists()), Path("/"))
    if not there.is_dir():
        raise Refusal(f"{word} cannot be a folder, since {there} is a file: name another")
    if not os.access(there, os.W_OK):
        raise Refusal(f"{word} cannot be written to, since nothing may be written to {there}: name another")


def composed(command: str, words: Sequence[str]) -> DictConfig:
    """The configuration of a file of ``conf`` with a command line's overrides.

    Raises:
        Refusal: for what Hydra cannot compose, in one line.
    """
    check_words(words)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose(command, list(words))
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: a group that is null
        line = one_line(error)
        raise Refusal(f"{line} {OWN_CARD}" if "Could not find 'gpu/" in line else line) from error


def one_line(error: Exception) -> str:
    """Hydra's message without its advice and its search path."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line for line in lines if not line.startswith(ADVICE))
