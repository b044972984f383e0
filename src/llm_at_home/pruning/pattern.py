"""Where zeros may lie: anywhere, or n:m; nothing heavy is imported here, since the parent process asks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_at_home.errors import Refusal

if TYPE_CHECKING:
    import torch

UNSTRUCTURED = "unstructured"


@dataclass(frozen=True)
class Pattern:
    """How many weights become zero, and among which.

    Args:
        sparsity: the share of zeros.
        kept: n of n:m: how many of ``group`` consecutive inputs of an output stay at most; 0 where zeros lie anywhere.
        group: m of n:m.
    """

    sparsity: float
    kept: int = 0
    group: int = 0

    @classmethod
    def of(cls, prune: Mapping[str, Any]) -> Pattern:
        """What a ``prune`` group asks for.

        Raises:
            Refusal: for a share or a pattern that does not exist.
        """
        text = str(prune["pattern"])
        if text == UNSTRUCTURED:
            sparsity = prune["sparsity"]
            if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 < sparsity < 1:
                raise Refusal(f"prune.sparsity={sparsity} is no share of the weights: give one between 0 and 1")
            return cls(float(sparsity))
        found = re.fullmatch(r"(\d+):(\d+)", text)
        kept, group = map(int, found.groups()) if found else (0, 0)
        if not 0 < kept < group:
            raise Refusal(f"prune.pattern={text} is unknown: choose {UNSTRUCTURED}, or n:m with n below m, such as 2:4")
        return cls(1 - kept / group, kept, group)

    def lowest(self, scores: torch.Tensor, by_row: bool) -> torch.Tensor:
        """Which weights go: those of the lowest scores, of equal ones the first.

        Args:
            scores: of shape (outputs, inputs), finite.
            by_row: each output loses the same share; otherwise the lowest of the whole matrix go. n:m is by its groups.

        Returns:
            A mask of the scores' shape, true where the weight becomes zero: exactly the share that was asked for,
            rounded to a whole number in each row or in the matrix.
        """
        import torch

        rows, columns = scores.shape
        if self.group:
            groups = scores.reshape(rows, columns // self.group, self.group)
            lowest = groups.argsort(dim=-1, stable=True)[..., : self.group - self.kept]
            return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, lowest, True).reshape(rows, columns)
        among = scores if by_row else scores.reshape(1, -1)
        count = round(self.sparsity * among.shape[1])
        if count == 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        threshold = among.kthvalue(count, dim=1, keepdim=True).values
        below, equal = among < threshold, among == threshold
        missing = count - below.sum(dim=1, keepdim=True)
        return (below | (equal & (equal.cumsum(dim=1) <= missing))).reshape(rows, columns)
