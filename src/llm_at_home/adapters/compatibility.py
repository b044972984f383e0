"""Which adapters cannot be trained on which bases: refused at composition, in one line that says what to change.

Each entry was found by trying (``benchmarks/adapter_matrix.py --ignore-refusals`` tries them again). This file holds
what PEFT cannot do; a quantization's own ``check`` refuses what its kernels cannot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_at_home.adapters import methods
from llm_at_home.errors import Refusal

# The keys by which a configuration asks for a feature of PEFT that only some bases have.
DORA, PEFT_LYCORIS = "DoRA", "PEFT's own LoKr and LoHa"
INSTEAD = {DORA: "adapter=lora, or quant=nf4", PEFT_LYCORIS: "adapter.implementation=factored"}
# By base: the feature, and why not.
REFUSED: dict[str, dict[str, str]] = {
    "int8": {
        DORA: "PEFT's DoRA fails at the second forward pass over LLM.int8() layers",
        PEFT_LYCORIS: "they do not know its weight",
    },
    "4-bit": {PEFT_LYCORIS: "they take the packed weight for the weight"},
    "gptq": {DORA: "PEFT has no DoRA for GPTQ", PEFT_LYCORIS: "they take linear layers of torch alone"},
    "awq": {DORA: "PEFT has no DoRA for AWQ", PEFT_LYCORIS: "they take linear layers of torch alone"},
}


def base_kind(quant: Mapping[str, Any]) -> str:
    """The kind of base that a ``quant`` group gives: its method, told apart where adapters differ."""
    method = str(quant["method"])
    if method == "bitsandbytes":
        return "int8" if quant["bits"] == 8 else "4-bit"
    return str(quant["algorithm"]) if method == "gptqmodel" else method


def features(adapter: Mapping[str, Any]) -> list[str]:
    """What an ``adapter`` group asks for that not every base has."""
    asked = {DORA: adapter.get("use_dora"), PEFT_LYCORIS: adapter.get("implementation") == methods.PEFT}
    return [feature for feature, wanted in asked.items() if wanted]


def check(config: Mapping[str, Any]) -> None:
    """Refuse, before anything loads, an adapter that cannot be trained on this base.

    Raises:
        Refusal: with one line that says what to change.
    """
    adapter, quant = config["adapter"], config["quant"]
    if adapter.get("implementation", methods.FACTORED) not in methods.IMPLEMENTATIONS:
        known = " or ".join(methods.IMPLEMENTATIONS)
        raise Refusal(f"adapter.implementation={adapter['implementation']} is unknown: choose {known}")
    reasons = REFUSED.get(base_kind(quant), {})
    for feature in features(adapter):
        if feature in reasons:
            raise Refusal(
                f"adapter={adapter['name']} cannot be trained on quant={quant['name']} ({reasons[feature]}): use "
                f"{INSTEAD[feature]}"
            )
