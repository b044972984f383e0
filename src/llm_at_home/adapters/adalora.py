"""AdaLoRA's work between two steps, many matrices at a time.

PEFT goes through them one by one, with some twenty small operations each: on an H100, launching those took longer than
all kernels of a 7B's step (docs/fast_training.md). Values, schedule and state are PEFT's, but for rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

from llm_at_home.adapters.packed import PackedAdaLoraModel

A, B, E = "lora_A", "lora_B", "lora_E"
# Values that are copied together: 128 MiB of float32.
AT_ONCE = 2**25


class Triplets:
    """The matrices of an AdaLoRA adapter: by name, and in groups of one kind and shape.

    Args:
        model: the base with the adapter's layers in it, as PEFT's rank allocator is given it.
        adapter: its name.
    """

    def __init__(self, model: nn.Module, adapter: str) -> None:
        of_kinds = tuple(f"{kind}.{adapter}" for kind in (A, B, E))
        self.parameters: dict[str, torch.Tensor] = {
            name: parameter for name, parameter in model.named_parameters() if any(kind in name for kind in of_kinds)
        }
        # Of every kind in the same order.
        values = [name for name in self.parameters if E in name]
        self.names = {kind: [name.replace(E, kind) for name in values] for kind in (A, B, E)}
        self.groups = {kind: self._alike(names) for kind, names in self.names.items()}

    def _alike(self, names: list[str]) -> list[list[str]]:
        by_shape: dict[torch.Size, list[str]] = {}
        for name in names:
            by_shape.setdefault(self.parameters[name].shape, []).append(name)
        groups = []
        for shape, alike in by_shape.items():
            most = max(1, AT_ONCE // max(1, shape.numel()))
            groups += [alike[start : start + most] for start in range(0, len(alike), most)]
        return groups

    @torch.no_grad()
    def penalize(self, weight: float) -> torch.Tensor:
        """Add the gradient of the orthogonality penalty to those of the matrices; the penalty, a scalar.

        It is ``weight`` times the mean Frobenius norm of A A^T - I and B^T B - I (Zhang et al. 2023, equation 4). The
        gradient of such a norm N is 2 (A A^T - I) A / N; none where N is 0.
        """
        count = len(self.names[A]) + len(self.names[B])
        norms = []
        for kind in (A, B):
            for names in self.groups[kind]:
                parameters = [self.parameters[name] for name in names]
                stacked = torch.stack(parameters)
                excess = stacked @ stacked.mT if kind == A else stacked.mT @ stacked
                excess.diagonal(dim1=1, dim2=2).sub_(1)
                norm = torch.linalg.vector_norm(excess, dim=(1, 2), keepdim=True)
                norms.append(norm.flatten())
                excess.div_(norm.clamp_min(torch.finfo(norm.dtype).tiny)).mul_(2 * weight / count)
                slopes = excess @ stacked if kind == A else stacked @ excess
                torch._foreach_add_(_gradients(parameters), list(slopes.unbind()))
        return weight * torch.cat(norms).mean()


def _gradients(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """Theirs; zeros, from now on, where there was none."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


class BatchedRankAllocator(RankAllocator):
    """PEFT's, whose schedule and state it keeps; the scores are now written in place.

    The one wait for a GPU is for the pattern of an allocation, which PEFT keeps as lists.
    """

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str) -> None:
        super().__init__(model, peft_config, adapter_name)
        self._triplets: Triplets | None = None
        self._pattern: Mapping[str, Any] | None = None
        self._lost: Any = None  # by that pattern

    def _of(self, model: nn.Module) -> Triplets:
        # At the first step and not before: loading an adapter makes its matrices anew.
        if self._triplets is None:
            self._triplets = Triplets(model, self.adapter_name)
        return self._triplets

    @torch.no_grad()
    def update_ipt(self, model: nn.Module) -> None:
        """Sensitivity, its moving average and that average's spread, of every weight (equations 8 and following)."""
        triplets = self._of(model)
        scores = (self.ipt, self.exp_avg_ipt, self.exp_avg_unc)
        if not self.ipt:
            for score in scores:
                score.update((name, torch.zeros_like(p)) for name, p in triplets.parameters.items())
        for names in [names for groups in triplets.groups.values() for names in groups]:
            parameters = [triplets.parameters[name] for name in names]
            sensitivity, average, spread = ([score[name] for name in names] for score in scores)
            torch._foreach_copy_(sensitivity, _gradients(parameters))
            torch._foreach_mul_(sensitivity, parameters)
            torch._foreach_abs_(sensitivity)
            torch._foreach_mul_(average, self.beta1)
            torch._foreach_add_(average, sensitivity, alpha=1 - self.beta1)
            apart = torch._foreach_sub(sensitivity, average)
            torch._foreach_abs_(apart)
            torch._foreach_mul_(spread, self.beta2)
            torch._foreach_add_(spread, apart, alpha=1 - self.beta2)

    @torch.no_grad()
    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        """Zero the singular values of the least important directions; by E's name, which directions stay."""
        triplets = self._of(model)
        scores = self._scores(triplets, E, 2) + (self._scores(triplets, A, 2) + self._scores(triplets, B, 1))
        lost = scores <= torch.kthvalue(scores, self.init_bgt - budget).values
        self._zero(triplets, lost)
        kept = iter((~lost).tolist())
        return {name: list(islice(kept, len(triplets.parameters[name]))) for name in triplets.names[E]}

    def _scores(self, triplets: Triplets, kind: str, dim: int) -> torch.Tensor:
        """The mean importance of every direction's entries in the matrices of one kind, in their order."""
        means: dict[str, torch.Tensor] = {}
        for names in triplets.groups[kind]:
            importance = torch._foreach_mul(
                [self.exp_avg_ipt[name] for name in names], [self.exp_avg_unc[name] for name in names]
            )
            means.update(zip(names, torch.stack(importance).mean(dim).unbind(), strict=True))
        return torch.cat([means[name] for name in triplets.names[kind]])

    @torch.no_grad()
    def mask_using_rank_pattern(self, model: nn.Module, rank_pattern: Mapping[str, Any]) -> None:
        """Zero the singular values of the directions that an earlier allocation took away."""
        triplets = self._of(model)
        if rank_pattern is not self._pattern:
            names = triplets.names[E]
            if self.adapter_name not in next(iter(rank_pattern)):  # as PEFT leaves the names when it saves
                names = [name.replace(f".{self.adapter_name}", "") for name in names]
            kept = torch.cat([torch.as_tensor(rank_pattern[name], dtype=torch.bool).flatten() for name in names])
            self._pattern, self._lost = rank_pattern, ~kept.to(triplets.parameters[triplets.names[E][0]].device)
        self._zero(triplets, self._lost)

    @staticmethod
    def _zero(triplets: Triplets, lost: torch.Tensor) -> None:
        values = [triplets.parameters[name].view(-1) for name in triplets.names[E]]
        left = torch.cat(values).masked_fill_(lost, 0.0)
        torch._foreach_copy_(values, left.split([len(value) for value in values]))


class BatchedAdaLoraModel(PackedAdaLoraModel):
    """PEFT's AdaLoRA with :class:`BatchedRankAllocator`."""

    def __init__(self, model: nn.Module, config: Any, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(model, config, adapter_name, **kwargs)
        if hasattr(self, "rankallocator"):  # an adapter that is not to be trained has none
            self.rankallocator = BatchedRankAllocator(self.model, self.peft_config[adapter_name], adapter_name)
