"""Makes this project's adapter methods known to PEFT, so that they are saved, loaded and switched as all others."""

from __future__ import annotations

from typing import Any

# LoKr, LoHa and AdaLoRA's allocation of ranks as computed here, or as PEFT does.
FACTORED, PEFT = "factored", "peft"
IMPLEMENTATIONS = (FACTORED, PEFT)


def register(implementation: str = FACTORED) -> None:
    """Put the methods in PEFT's tables. Calling it again does no harm.

    Args:
        implementation: ``factored`` computes LoKr and LoHa with their factors (checkpoints are the same) and AdaLoRA's
            ranks for many matrices at once, ``peft`` as PEFT does, for comparison. It holds for the adapters made or
            loaded afterwards in this process.

    Raises:
        ValueError: for another word.
    """
    from peft import LoHaModel, LoKrModel, PeftType, mapping

    from llm_at_home.adapters import bottleneck
    from llm_at_home.adapters.adalora import BatchedAdaLoraModel
    from llm_at_home.adapters.loha import FactoredLoHaModel
    from llm_at_home.adapters.lokr import FactoredLoKrModel
    from llm_at_home.adapters.packed import PackedAdaLoraModel, PackedIA3Model

    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"adapter.implementation={implementation} is none of {', '.join(IMPLEMENTATIONS)}")
    tuners: Any = mapping.PEFT_TYPE_TO_TUNER_MAPPING
    factored = implementation == FACTORED
    tuners[PeftType.LOKR] = FactoredLoKrModel if factored else LoKrModel
    tuners[PeftType.LOHA] = FactoredLoHaModel if factored else LoHaModel
    tuners[PeftType.ADALORA] = BatchedAdaLoraModel if factored else PackedAdaLoraModel
    tuners[PeftType.IA3] = PackedIA3Model
    tuners[bottleneck.PEFT_TYPE] = bottleneck.BottleneckModel
    configs: Any = mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    configs[bottleneck.PEFT_TYPE] = bottleneck.BottleneckConfig
    prefixes: Any = mapping.PEFT_TYPE_TO_PREFIX_MAPPING
    prefixes[bottleneck.PEFT_TYPE] = bottleneck.BottleneckModel.prefix
