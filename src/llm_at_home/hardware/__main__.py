"""``python -m llm_at_home.hardware`` prints the GPU catalogue as Markdown."""

from __future__ import annotations

import sys

from llm_at_home.errors import Refusal
from llm_at_home.hardware.catalogue import load_catalogue
from llm_at_home.hardware.table import markdown


def main() -> int:
    """Print the table; exit code 2 where there is no catalogue."""
    try:
        print(markdown(load_catalogue().values()))
    except Refusal as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
