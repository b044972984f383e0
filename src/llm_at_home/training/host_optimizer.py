"""AdamW whose state and step are the host's: a GPU keeps the weights and their gradients alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class HostAdamW(torch.optim.Optimizer):
    """AdamW on copies of the weights in host memory (ZeRO-Offload's optimizer, Ren et al. 2021, section 4, on one GPU).

    The host keeps 12 bytes a parameter (the weight and two moments, in float32), also where the weights are in 16 bits,
    whose small updates are so not lost. An optimizer step moves the gradients there and the weights back, one tensor
    after the other, in the dtype that they have and through page-locked memory.

    torchao's ``CPUOffloadOptimizer`` copies gradients in the backward pass, which is before they are averaged over the
    tokens and clipped, and so cannot be used here.

    Args:
        params: as ``torch.optim.AdamW`` takes them.
        lr: learning rate.
        weight_decay: decoupled, as there.
        options: further ones of ``torch.optim.AdamW`` (``betas``, ``eps``).
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        # One for each tensor, so that the host never keeps all gradients at once. Fused: the step in one pass.
        self._hosts = [
            torch.optim.AdamW([self._host_copy(parameter)], fused=True, **options)
            for group in self.param_groups
            for parameter in group["params"]
        ]
        self._staging = torch.empty(0, dtype=torch.uint8)

    @staticmethod
    def _host_copy(parameter: torch.Tensor) -> torch.Tensor:
        # Always its own memory, also where the parameter is in the host's already.
        return parameter.detach().to("cpu", torch.float32, copy=True).requires_grad_()

    def _staged(self, parameter: torch.Tensor) -> torch.Tensor:
        """Host memory that all tensors use in turn, in this one's shape and dtype."""
        if self._staging.numel() < parameter.nbytes:
            largest = max(p.nbytes for group in self.param_groups for p in group["params"])
            self._staging = torch.empty(largest, dtype=torch.uint8, pin_memory=parameter.is_cuda)
        return self._staging[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of AdamW on the host, with the learning rate that the schedule has set."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        for (parameter, group), optimizer in zip(pairs, self._hosts, strict=True):
            if parameter.grad is None:
                continue
            (host_group,) = optimizer.param_groups
            (host,) = host_group["params"]
            staged = self._staged(parameter)
            host.grad = staged.copy_(parameter.grad).to(torch.float32)
            host_group |= {"lr": group["lr"], "weight_decay": group["weight_decay"]}
            optimizer.step()
            host.grad = None
            # The next gradient comes into the same memory, but on the same stream, and so after this.
            parameter.copy_(staged.copy_(host), non_blocking=True)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The moments and the host's weights; learning rates as ``torch.optim.Optimizer`` keeps them."""
        weights = [optimizer.param_groups[0]["params"][0].detach() for optimizer in self._hosts]
        hosts = [optimizer.state_dict() for optimizer in self._hosts]
        return {**super().state_dict(), "hosts": hosts, "host_weights": weights}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave; all of it stays on the host."""
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        kept = zip(self._hosts, state_dict["hosts"], state_dict["host_weights"], strict=True)
        for optimizer, state, weight in kept:
            optimizer.load_state_dict(state)
            optimizer.param_groups[0]["params"][0].copy_(weight)
