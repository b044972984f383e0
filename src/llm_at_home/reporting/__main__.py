"""``python -m llm_at_home.reporting [FOLDER ...] [--out reports]``: the report, behind ``make report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llm_at_home.errors import Refusal
from llm_at_home.reporting import DEFAULT_FOLDERS, write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Make the report; 0 when it is written, 2 when there is nothing to make it from."""
    parser = argparse.ArgumentParser(
        prog="python -m llm_at_home.reporting",
        description="Turn the records below the folders into a page, CSV files and terminal tables.",
    )
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help=f"default: {' and '.join(DEFAULT_FOLDERS)}")
    parser.add_argument("--out", default="reports", help="where the report is written (default: %(default)s)")
    parser.add_argument("--prices", metavar="FILE", help="your prices, in the form of the package's prices.yaml")
    args = parser.parse_args(argv)
    try:
        write_report(args.folders or DEFAULT_FOLDERS, args.out, args.prices)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"the report could not be written: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
