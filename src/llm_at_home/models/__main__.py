"""``python -m llm_at_home.models prepare`` converts the embedded model once, so that no run has to."""

from __future__ import annotations

import argparse
import sys

from llm_at_home.errors import Refusal
from llm_at_home.models.embedded import converted_folder, ensure_converted


def main(argv: list[str] | None = None) -> int:
    """Convert the embedded model if it is not there yet; exit code 1, with one line, when it cannot be."""
    parser = argparse.ArgumentParser(prog="python -m llm_at_home.models", description=__doc__)
    parser.add_subparsers(dest="command", required=True).add_parser("prepare", help="convert the embedded model")
    parser.parse_args(argv)
    if not (converted_folder() / "config.json").is_file():
        print("converting the embedded model (half a minute, once)", flush=True)
        try:
            print(f"kept in {ensure_converted()}")
        except (Refusal, OSError) as error:
            print(f"setup: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
