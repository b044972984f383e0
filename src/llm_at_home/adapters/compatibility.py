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
DORA, PEFT_LYCORIS, PISSA, LOFTQ = "DoRA", "PEFT's own LoKr and LoHa", "PiSSA", "LoftQ"
INSTEAD = {DORA: "adapter=lora, or quant=nf4", PEFT_LYCORIS: "adapter.implementation=factored"}
# What works on the quantizations named alone, and why.
ONLY = {
    PISSA: (("none",), "it takes the base's weights apart"),
    LOFTQ: (("nf4", "nf4_nested"), "it makes up for the rounding of nf4"),
}
TRAINS = ("adapter", "all", "nothing")
# Starts of LoRA that PEFT computes from data, which somebody has to show it; without it trains from another start.
PREPARED = ("eva", "corda", "lora_ga")
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
    start = str(adapter.get("init_lora_weights", ""))
    asked = {
        PISSA: start.startswith("pissa"),
        LOFTQ: adapter.get("loftq"),
        DORA: adapter.get("use_dora"),
        PEFT_LYCORIS: adapter.get("implementation") == methods.PEFT,
    }
    return [feature for feature, wanted in asked.items() if wanted]


def check(config: Mapping[str, Any]) -> None:
    """Refuse, before anything loads, an adapter that cannot be trained on this base.

    Raises:
        Refusal: with one line that says what to change.
    """
    adapter, quant = config["adapter"], config["quant"]
    if adapter["trains"] not in TRAINS:
        raise Refusal(f"adapter.trains={adapter['trains']} is unknown: choose one of {', '.join(TRAINS)}")
    start = str(adapter.get("init_lora_weights"))
    if start.startswith(PREPARED):
        raise Refusal(
            f"adapter.init_lora_weights={start} starts from data, which nothing here shows it: use adapter=lora"
        )
    if adapter.get("implementation", methods.FACTORED) not in methods.IMPLEMENTATIONS:
        known = " or ".join(methods.IMPLEMENTATIONS)
        raise Refusal(f"adapter.implementation={adapter['implementation']} is unknown: choose {known}")
    for feature in features(adapter):
        names, why = ONLY.get(feature, ((quant["name"],), ""))
        if quant["name"] not in names:
            choices = " or ".join(f"quant={name}" for name in names)
            raise Refusal(f"adapter={adapter['name']} needs {choices}, since {why}: use that, or adapter=lora")
        if feature == LOFTQ and config["model"]["weights"] == "random":
            raise Refusal(
                "adapter=lora_loftq reads the unquantized weights, which random ones are not: use adapter=lora"
            )
    reasons = REFUSED.get(base_kind(quant), {})
    for feature in features(adapter):
        if feature in reasons:
            raise Refusal(
                f"adapter={adapter['name']} cannot be trained on quant={quant['name']} ({reasons[feature]}): use "
                f"{INSTEAD[feature]}"
            )
