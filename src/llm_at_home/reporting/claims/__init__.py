"""The ledger of claims: each statement of the paper, the article or a method's authors as a test over the records.

A claim is a file in ``ledger/``; what the records say of it is :class:`~llm_at_home.reporting.claims.verdict.Finding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_at_home.reporting.claims.verdict import Finding
    from llm_at_home.reporting.load import Loaded

LEDGER = Path(__file__).with_name("ledger")


def findings(loaded: Loaded, folders: Sequence[Path | str] = (LEDGER,)) -> list[Finding]:
    """What the records say of every claim in the folders, in the order of the files' names.

    Args:
        loaded: the records.
        folders: of claim files.

    Raises:
        Refusal: for a malformed claim, naming file and key.
    """
    from llm_at_home.reporting.claims import claim, verdict

    return [verdict.judge(one, loaded) for one in claim.read_all(folders)]
