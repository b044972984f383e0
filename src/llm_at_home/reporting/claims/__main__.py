"""``python -m llm_at_home.reporting.claims [FOLDER ...]``: what the records say of every claim."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llm_at_home.errors import Refusal
from llm_at_home.reporting import DEFAULT_FOLDERS, load
from llm_at_home.reporting.claims import LEDGER, findings, page, words
from llm_at_home.reporting.claims.verdict import Finding


def main(argv: Sequence[str] | None = None) -> int:
    """Print the ledger; 0 whatever the verdicts, 2 for a malformed claim or where there are no records."""
    parser = argparse.ArgumentParser(prog="python -m llm_at_home.reporting.claims", description=__doc__)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help=f"default: {' and '.join(DEFAULT_FOLDERS)}")
    parser.add_argument("--claims", action="append", default=[], metavar="FOLDER", help="more claims, a YAML file each")
    args = parser.parse_args(argv)
    try:
        found = findings(load.load(args.folders or DEFAULT_FOLDERS), (LEDGER, *args.claims))
    except Refusal as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    for finding in found:
        print("\n".join(_lines(finding)))
    print(page.counted(found))
    return 0


def _lines(finding: Finding) -> list[str]:
    claim = finding.claim
    reason = f" ({finding.reason})" if finding.reason else ""
    lines = [f"{finding.verdict.upper()}{reason}: {claim.claim}", f"    {claim.document}, {claim.place}; {claim.name}"]
    lines.append(f"    {words.asked(finding).replace('`', '')}")
    for case in finding.cases:
        runs = " against ".join(words.name(run) for run in case.runs)
        why = f": {case.reason}" if case.reason and case.reason != finding.reason else ""
        lines.append(f"    {case.verdict:9} {words.effect(case)}  {runs}{why}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
