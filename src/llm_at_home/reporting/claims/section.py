"""The ledger as a section of the report's page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llm_at_home.reporting.claims import findings, words
from llm_at_home.reporting.claims.page import counted
from llm_at_home.reporting.load import Loaded

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


def draw(loaded: Loaded, environment: Environment, href: Callable[[Path], str]) -> Markup | str:
    """The section's HTML, every text in it escaped; empty where the records touch no claim.

    Args:
        loaded: the records.
        environment: of the report's templates.
        href: from a record's file to a link.
    """
    from markupsafe import Markup

    every = findings(loaded)
    found = [finding for finding in every if finding.cases]
    if not found:
        return ""
    template = environment.get_template("claims/claims.html.jinja")
    return Markup(
        template.render(
            findings=found,
            untouched=len(every) - len(found),
            counted=counted(found),
            words=words,
            href=href,
        )
    )
