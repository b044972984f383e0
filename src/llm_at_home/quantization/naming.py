"""What a quantization is called: a name in a few words that tells it from others of its method."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

# Words for what a configuration of ``quant`` says beside its name; a value that is not here goes without saying.
WORDS: dict[str, dict[Any, str]] = {
    "scheme": {"symmetric": "symmetric"},
    "sym": {True: "symmetric"},
    "desc_act": {True: "act-order"},
    "algorithm": {"hqq": "hqq"},
    "activation": {"dynamic": "activations too"},
}


def quant_words(quant: dict[str, Any]) -> list[str]:
    """The name of a ``quant`` group, then bits, group size and scheme where the name alone does not tell them.

    Any key may be missing or of another shape, as in a record of an older version.
    """
    words = [str(quant.get("name"))]
    bits, target = quant.get("bits"), quant.get("target_bits")
    if _is_number(bits) and not any(character.isdigit() for character in words[0]):
        words.append(f"{bits:g} bits")
    if _is_number(target):
        words.append(f"{target:g} bits on average")
    if quant.get("granularity", "group") != "group":
        words.append(f"per {quant['granularity']}")
    elif quant.get("group_size"):
        words.append(f"groups of {quant['group_size']}")
    if quant.get("path") or quant.get("type"):
        words.append(PurePath(str(quant["path"])).name if quant.get("path") else str(quant["type"]))
    for key, said in WORDS.items():
        value = quant.get(key)
        if isinstance(value, str | bool) and value in said:
            words.append(said[value])
    return words


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
