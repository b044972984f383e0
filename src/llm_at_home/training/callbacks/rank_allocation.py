"""AdaLoRA's part of the training loop: its penalty, and the ranks that it hands out after each optimizer step."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from llm_at_home.records.schema import Reading

SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
NOT_ADALORA = "the adapter hands out no ranks"


class RankAllocation(Callback):
    """Lowers the ranks of an AdaLoRA adapter on its schedule; does nothing for other adapters.

    PEFT's AdaLoRA never prunes by itself: after each optimizer step, and while its gradients are still there, somebody
    must tell it so. It also adds its orthogonality penalty only to losses that the model computes, which ours does not.
    Zhang et al. 2023, equations 4, 8 and 12.
    """

    def __init__(self) -> None:
        self._model: Any = None
        self._triplets: Any = None
        self._restored: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Find the adapter, if it is one of AdaLoRA's, and put back what a resumed run knew of its directions.

        Here and not when training starts, which it does not where the last step was made before.
        """
        from peft import AdaLoraModel

        base = getattr(pl_module.model, "base_model", None)
        if isinstance(base, AdaLoraModel) and hasattr(base, "rankallocator"):
            from llm_at_home.adapters.adalora import Triplets

            self._model = base
            self._triplets = Triplets(base.model, base.trainable_adapter_name)
            pl_module.penalty = self.penalty
            pl_module.after_optimizer_step = self.allocate
            self._restore(pl_module)

    def _restore(self, pl_module: Any) -> None:
        if self._restored is None:
            return
        allocator, device = self._model.rankallocator, pl_module.device
        for name in SCORES:
            setattr(allocator, name, {key: value.to(device) for key, value in self._restored[name].items()})
        self._config.rank_pattern = self._restored["rank_pattern"]

    @property
    def _config(self) -> Any:
        return self._model.peft_config[self._model.trainable_adapter_name]

    def penalty(self) -> torch.Tensor | None:
        """Add the gradient of the penalty: how far the directions are from orthonormal. Its value, a scalar.

        None where its weight is 0.
        """
        weight = self._config.orth_reg_weight
        return self._triplets.penalize(weight) if weight else None

    def allocate(self, step: int) -> None:
        """After the optimizer's step number ``step``, the first of which is 1, while its gradients are there."""
        self._model.update_and_allocate(step)

    def ranks(self) -> dict[str, int]:
        """The rank of each matrix by its layer's name; empty for other adapters and before the first allocation."""
        pattern = self._config.rank_pattern if self._model is not None else None
        return {name.split(".lora_E")[0].removeprefix("model."): sum(kept) for name, kept in (pattern or {}).items()}

    def readings(self) -> dict[str, Reading]:
        """``rank_mean`` over all matrices; nothing for adapters whose rank is fixed."""
        if self._model is None:
            return {}
        ranks = self.ranks()
        if not ranks:
            return {"rank_mean": Reading.unknown("1", "the run ended before the first allocation")}
        return {"rank_mean": Reading(sum(ranks.values()) / len(ranks), "1", "counted", n=len(ranks))}

    def adapter_facts(self) -> dict[str, Any]:
        """What the record says of the adapter: the rank that each matrix was left with."""
        ranks = self.ranks()
        return {"rank_pattern": ranks} if ranks else {}

    def state_dict(self) -> dict[str, Any]:
        """The importance scores and the pattern, without which a resumed run would choose other directions."""
        if self._model is None:
            return {}
        allocator = self._model.rankallocator
        return {**{name: dict(getattr(allocator, name)) for name in SCORES}, "rank_pattern": self._config.rank_pattern}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the adapter is known."""
        self._restored = state_dict or None
