"""How many micro-batches make an optimizer step, from which step on; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_at_home.errors import Refusal

KEY = "callbacks.accumulation.steps"


def accumulation_schedule(steps: Any) -> dict[int, int]:
    """The schedule that ``callbacks.accumulation.steps`` means.

    Args:
        steps: micro-batches in an optimizer step, or a mapping from the optimizer steps made so far to that number,
            which holds from there on: ``{0: 8, 100: 4}``. A record's keys are text.

    Returns:
        That mapping, with 0 the first of its keys, in their order.

    Raises:
        Refusal: where a number is none, or too small, or the first steps have none.
    """
    schedule = steps if isinstance(steps, Mapping) else {0: steps}
    try:
        found = {int(str(start)): int(str(count)) for start, count in schedule.items()}
    except ValueError:
        raise Refusal(f"{KEY}={steps} is no schedule: give a number, or steps such as {{0: 8, 100: 4}}") from None
    if 0 not in found or min(found) < 0:
        raise Refusal(f"{KEY}={steps} does not say how to begin: give step 0 as well, such as {{0: 8, 100: 4}}")
    if min(found.values()) < 1:
        raise Refusal(f"{KEY}={steps} is too small: a step has at least 1 micro-batch")
    return dict(sorted(found.items()))
