"""Where things are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder of all that can be made or fetched again.

    It is ``LLM_AT_HOME_CACHE``, or ``~/.cache/llm-at-home``. Whoever writes into it
    creates it.
    """
    chosen = os.environ.get("LLM_AT_HOME_CACHE", "").strip()
    return Path(chosen).expanduser().absolute() if chosen else Path.home() / ".cache" / "llm-at-home"
