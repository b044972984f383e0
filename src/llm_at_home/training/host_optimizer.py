"""AdamW whose state and step are the host's: a GPU keeps the weights and their gradients alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class HostAdamW(torch.optim.Optimizer):
    """AdamW on copies of the weights in host memory (ZeRO-Offload's optimizer, Ren et al. 2021, section 4, on one GPU).

    The host keeps 12 bytes a parameter (the weight and two moments, in float32), also where the weights are in 16 bits,
    whose small updates are so not lost. An optimizer step moves the gradients there and the weights back.

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
        groups = [{**group, "params": [self._host_copy(p) for p in group["params"]]} for group in self.param_groups]
        self._host = torch.optim.AdamW(groups, **options)

    @staticmethod
    def _host_copy(parameter: torch.Tensor) -> torch.Tensor:
        # Always its own memory, also where the parameter is in the host's already.
        return parameter.detach().to("cpu", torch.float32, copy=True).requires_grad_()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of AdamW on the host, with the learning rate that the schedule has set."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = []
        for group, host_group in zip(self.param_groups, self._host.param_groups, strict=True):
            host_group |= {"lr": group["lr"], "weight_decay": group["weight_decay"]}
            pairs += list(zip(group["params"], host_group["params"], strict=True))
        for parameter, host in pairs:
            host.grad = None if parameter.grad is None else parameter.grad.to("cpu", torch.float32)
        self._host.step()
        for parameter, host in pairs:
            if host.grad is not None:
                parameter.copy_(host)
                host.grad = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The moments and the host's weights; learning rates as ``torch.optim.Optimizer`` keeps them."""
        weights = [host.detach() for group in self._host.param_groups for host in group["params"]]
        return {**super().state_dict(), "host": self._host.state_dict(), "host_weights": weights}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave; all of it stays on the host."""
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._host.load_state_dict(state_dict["host"])
        hosts = [host for group in self._host.param_groups for host in group["params"]]
        for host, weight in zip(hosts, state_dict["host_weights"], strict=True):
            host.copy_(weight)
