"""Hydra's plugins, which are extras: one that is named and not installed is refused in a line."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from llm_at_home.errors import Refusal

# By group: what its choices need, None standing for any of them, and the extra that brings it.
NEEDED: dict[str, dict[str | None, tuple[str, str]]] = {
    "hydra/launcher": {
        "joblib": ("hydra_joblib_launcher", "launchers"),
        "submitit": ("hydra_submitit_launcher", "launchers"),
        "slurm": ("hydra_submitit_launcher", "launchers"),
    },
    "hydra/sweeper": {"optuna": ("hydra_optuna_sweeper", "search")},
    "hparams_search": {None: ("hydra_optuna_sweeper", "search")},
}


def check(words: Sequence[str]) -> None:
    """Refuse a launcher or a sweeper that is not installed; Hydra itself would end with a traceback.

    Args:
        words: of the command line.

    Raises:
        Refusal: with the command that installs it.
    """
    for word in words:
        group, _, choice = word.partition("=")
        needed = NEEDED.get(group, {})
        plugin, extra = needed.get(choice) or needed.get(None) or ("", "")
        if plugin and choice != "null" and not _is_installed(plugin):
            raise Refusal(f"{word} needs a plugin of Hydra's that is not installed: pip install -e '.[{extra}]'")


def _is_installed(plugin: str) -> bool:
    try:
        return importlib.util.find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:  # no plugin at all is installed
        return False
