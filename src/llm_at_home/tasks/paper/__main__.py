"""``python -m llm_at_home.tasks.paper [--dry-run] [key=value]``: estimates the paper's runs, runs what is missing.

``--help`` shows its keys.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llm_at_home.errors import Refusal
from llm_at_home.tasks.paper import options as asked
from llm_at_home.tasks.paper import rows, summary
from llm_at_home.tasks.paper.listing import as_text
from llm_at_home.tasks.paper.progress import LEFT_OUT, REFUSED, Progress

EXIT_REFUSED = 2
HELP = {"-h", "--help"}


def main(words: Sequence[str] | None = None) -> int:
    """Run, or with ``--dry-run`` only list; 0 done, 1 a run failed or was stopped, 2 refused, all of it or each run."""
    words = sys.argv[1:] if words is None else words
    if HELP & set(words):
        print(asked.FILE.read_text(encoding="utf-8"), end="")
        return 0
    try:
        options = asked.read(words)
        planned = rows.runs(options)
        progress = Progress(planned, options)
        states = progress.look()
    except Refusal as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return EXIT_REFUSED
    print(as_text(states), flush=True)
    if all(state.status in (REFUSED, LEFT_OUT) for state in states):
        print("refused: no run of these can work, see above", file=sys.stderr)
        return EXIT_REFUSED
    if options.dry_run:
        return 0
    code = progress.run()
    print(summary.write(progress, planned[0].folder.parent, options))
    return code


if __name__ == "__main__":
    sys.exit(main())
