"""Bounds on a run's time and cost from a card's data sheet: no run is faster, and how much slower it is stays open.

How near a run comes to a card's peak is another share for every batch size and host, so that no estimate would be
honest; a bound is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_at_home.hardware.catalogue import Card
from llm_at_home.planning import adapters
from llm_at_home.planning.inference import read_bytes
from llm_at_home.planning.shape import Shape
from llm_at_home.planning.training import accumulation, batch_of, recomputed_layers
from llm_at_home.records.schema import Reading

METHOD = "data_sheet_bound"
NO_CARD = "no card of the catalogue is named: give gpu=, such as gpu=rtx4090"


def training_flops(config: Mapping[str, Any], shape: Shape) -> float:
    """Operations of the matrix products of one optimizer step.

    Two a weight and token forward, two for the gradient of the input, two for that of the weight where it trains, and
    two again where a layer is recomputed; attention's own products, which grow with the square of the length, are left
    out, which leaves the bound a bound.
    """
    batch = batch_of(config)
    steps = accumulation(config)
    tokens = batch.all_tokens * steps
    used = shape.linear_weights + shape.expert_weights * shape.experts_per_token / max(1, shape.experts)
    layers = used + (adapters.trained_parameters(shape, config["adapter"]) if _beside(config) else 0)
    passes = 4.0 + (2 if config["adapter"]["trains"] == "all" else 0)
    passes += 2 * recomputed_layers(config, shape) / shape.layers
    return tokens * (passes * layers + 4 * shape.vocabulary * shape.hidden)


def _beside(config: Mapping[str, Any]) -> bool:
    return adapters.kind(config["adapter"]) in (adapters.LORA, adapters.ADALORA)


def step_time(config: Mapping[str, Any], shape: Shape, card: Card | None) -> Reading:
    """Seconds that an optimizer step takes at least."""
    if card is None:
        return Reading.unknown("s", NO_CARD, METHOD)
    rate = card.tflops["tf32" if config["dtype"] == "float32" and card.tflops["tf32"] else config["dtype"]]
    if rate is None:
        return Reading.unknown("s", f"gpu={card.name} has no unit for {config['dtype']}", METHOD)
    return Reading(training_flops(config, shape) / (rate * 1e12), "s", METHOD)


def run_time(config: Mapping[str, Any], shape: Shape, card: Card | None) -> Reading:
    """Hours that the whole run takes at least."""
    step = step_time(config, shape, card)
    if step.value is None:
        return Reading.unknown("h", str(step.reason), METHOD)
    return Reading(step.value * config["trainer"]["max_steps"] / 3600, "h", METHOD)


def run_cost(time: Reading, card: Card | None) -> Reading:
    """What so many hours of the card cost to rent, in the currency of its price."""
    if card is None or time.value is None:
        return Reading.unknown("USD", NO_CARD if card is None else str(time.reason), METHOD)
    if card.price_hour.value is None:
        return Reading.unknown("USD", f"gpu={card.name} has no price by the hour: {card.price_hour.reason}", METHOD)
    return Reading(time.value * card.price_hour.value, str(card.price_hour.currency), METHOD)


def decode_rate(config: Mapping[str, Any], shape: Shape, prompt_tokens: int, card: Card | None) -> Reading:
    """Tokens a second that a batch's answers reach together at most: a step reads every weight that it uses once."""
    if card is None:
        return Reading.unknown("tokens/s", NO_CARD, METHOD)
    rows = config["engine"].get("batch_size", 1)
    return Reading(rows * card.bandwidth * 1e9 / read_bytes(shape, config, rows * prompt_tokens), "tokens/s", METHOD)
