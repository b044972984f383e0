"""What is asked of the places: a prompt, and its answer as far as it has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from llm_at_home.generation.reply import Sampling


@dataclass(eq=False)
class Asked:
    """A prompt and its answer so far.

    Args:
        prompt: token ids.
        sampling: how its tokens are chosen; its seed is its own, whatever is read or decoded beside it.
        tokens: of the answer; who asked adds them as they come.
        generator: of its samples, from the first on.
        reused: tokens of the prompt that were not read, since an earlier turn's were known.
    """

    prompt: Sequence[int]
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    generator: torch.Generator | None = None
    reused: int = 0

    @property
    def so_far(self) -> list[int]:
        """What is to be read before the next token can be told."""
        return [*self.prompt, *self.tokens]
