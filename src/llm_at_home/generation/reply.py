"""What an engine gives back, and how it is to choose tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

# FastChat's llm_judge (Zheng et al. 2023) answers each category at its own temperature; the question file lacks them.
PUBLISHED_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7
COLDEST = 1e-6  # of temperatures that logits are divided by: they become infinite by much smaller ones


def temperature_for(category: str, chosen: float | None) -> float:
    """The chosen temperature, or the published one of the question's category."""
    return chosen if chosen is not None else PUBLISHED_TEMPERATURES.get(category, OTHER_TEMPERATURE)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. ``temperature`` 0 is greedy; ``ignore_eos`` always makes ``max_new_tokens``."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = False


@dataclass
class Reply:
    """One answer and its times.

    ``time_to_first_token`` in seconds from the call to the first token on the host; ``intervals`` the seconds between
    each token and the next. Answers made in one batch wait for each other: they share the time to the first token, and
    each has the intervals of the batch's decode steps up to its own last token.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    finish_reason: str
    time_to_first_token: float | None = None
    intervals: list[float] = field(default_factory=list)
    reused_tokens: int = 0  # of the prompt, which an earlier answer's cache held already
    first_token_at: float | None = None  # on the host's monotonic clock; only streams need it


class Stream(list[Reply]):
    """Replies that were decoded side by side, each beginning when a place was free.

    Args:
        replies: each with ``first_token_at``.
        places: how many could be decoded at once.
    """

    def __init__(self, replies: Iterable[Reply], places: int) -> None:
        super().__init__(replies)
        self.places = places

    @property
    def seconds(self) -> float:
        """From the first token of all to the last."""
        times = [(one.first_token_at, one.first_token_at + sum(one.intervals)) for one in self if one.first_token_at]
        return max(end for _, end in times) - min(start for start, _ in times) if times else 0.0
