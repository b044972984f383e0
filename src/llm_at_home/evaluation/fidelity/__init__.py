"""Fidelity: how far a quantized model's next-token distributions are from those of its own unquantized baseline.

A judge's score moves by noise where these figures do not: they compare the two models on every token of the same texts
(Dutta et al. 2024, "Accuracy is Not All You Need", on flips and KL divergence).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.models.source import quantized_as

ROWS = "fidelity.jsonl"
HELD_OUT, OWN_ANSWERS = "held_out", "own_answers"
# What the figures on each set of texts have at the end of their names.
SUFFIXES = {HELD_OUT: "", OWN_ANSWERS: "_own_answers"}

_LEAST = {"max_length": 2, "answer_tokens": 0, "baseline_top_k": 1}


def check(config: Mapping[str, Any]) -> None:
    """Refuse settings under which nothing would be measured, and a model that brings no unquantized baseline.

    Raises:
        Refusal: with one line that says what to change.
    """
    options = config["fidelity"]
    for key, least in _LEAST.items():
        if type(options[key]) is not int or options[key] < least:
            raise Refusal(f"fidelity.{key}={options[key]} is too small, or no whole number: give at least {least}")
    stored = quantized_as(config["model"])
    if stored and not options["baseline_source"]:
        hint = "name the unquantized one with fidelity.baseline_source=HUB_ID_OR_FOLDER"
        raise Refusal(f"{config['model']['source']} is quantized already ({stored}) and has no baseline: {hint}")
