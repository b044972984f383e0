"""``python -m llm_at_home.evaluation compare RUN_A RUN_B`` sets two fidelity runs against each other."""

from __future__ import annotations

import argparse
import sys

from llm_at_home.errors import Refusal
from llm_at_home.evaluation.fidelity.comparison import Run, as_text, compare


def main(argv: list[str] | None = None) -> int:
    """Print each figure's paired difference; exit code 2, with one line, for runs that cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m llm_at_home.evaluation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    two = commands.add_parser("compare", help="paired differences of two runs of task=fidelity on the same texts")
    two.add_argument("a", help="a run's folder")
    two.add_argument("b", help="another's; differences are a - b")
    arguments = parser.parse_args(argv)
    try:
        a, b = Run.load(arguments.a), Run.load(arguments.b)
        print(as_text(a, b, compare(a, b)))
    except Refusal as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
