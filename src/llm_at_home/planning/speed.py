"""How fast a run will be on a card: measured there, or predicted from the share of its peak that another card reached.

Decoding with ``engine=graph`` reads bytes: its share of the data sheet's bandwidth carries over. Eager decoding waits
for the host, so its time for a layer does, until the bytes take longer. Fine-tuning's share of the data sheet's
operations carries over. How far such predictions were from published figures is in ``measured.yaml``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_at_home.hardware.catalogue import Card, load_catalogue
from llm_at_home.planning import bounds, measurements
from llm_at_home.planning.allocator import constants
from llm_at_home.planning.inference import read_bytes
from llm_at_home.planning.measurements import Pace
from llm_at_home.planning.search import divided
from llm_at_home.planning.shape import Shape
from llm_at_home.planning.training import with_batch
from llm_at_home.records.schema import Reading

MEASURED, PREDICTED, AT_MOST = "measured", "predicted", "at_most"
GRAPH_KINDS = ("llama", "mistral", "qwen2", "qwen3")
SAME_BITS = 0.05  # how far a group size moves the bytes of 4 bits at most; a bit more or less moves them by a fifth
MARLIN_ALONE = "with Marlin's kernels alone, which this card has not"
TRITON = (8, 0)  # the compute capability from which engine=graph has the kernels that were measured


@dataclass(frozen=True)
class Speed:
    """A rate and the energy of each unit.

    Attributes:
        rate: tokens/s of one conversation, or steps/s; its method begins with measured or predicted.
        energy: J of each, measured or at most; at most is the card's power limit for that time.
        engine: which the rate is of; None for training.
        error: the relative errors that such predictions had, lowest and highest, or None where none was held against a
            figure; None for what was measured.
        why: says where the error is from, or why there is none.
    """

    rate: Reading
    energy: Reading
    engine: str | None = None
    error: tuple[float, float] | None = None
    why: str = ""


def decoding(config: Mapping[str, Any], shape: Shape, prompt_tokens: int, card: Card) -> Speed:
    """One conversation's tokens a second, with the fastest engine that was measured for this quantization."""
    tokens = prompt_tokens + config["engine"]["max_new_tokens"] // 2
    has_graph = shape.kind in GRAPH_KINDS and config["dtype"] == "bfloat16" and card.compute_capability >= TRITON
    graph = _graph_pace(config) if has_graph else None
    if graph is not None:
        step = read_bytes(shape, config, tokens) / (card.bandwidth * 1e9 * _share_of_bandwidth(graph))
        why = (
            f"engine=graph: its share of an H100's bandwidth ({graph.place}, n = {graph.n}); held against no other card"
        )
        return _speed(1 / step, graph, shape, card, "graph", None, why)
    eager = measurements.eager_pace(config["quant"], config["dtype"], card.compute_capability)
    if eager is None:
        known = measurements.eager_pace(config["quant"], config["dtype"]) is not None
        reason = f"was measured {MARLIN_ALONE}" if known else "was not measured on a GPU"
        unknown = Reading.unknown("tokens/s", f"quant={config['quant']['name']} {reason}")
        return Speed(unknown, Reading.unknown("J/token", str(unknown.reason)))
    layers = Shape.of(eager.config["model"]).layers
    step = max(shape.layers / layers / eager.rate, read_bytes(shape, config, tokens) / (card.bandwidth * 1e9))
    error, why = _held_against("eager", "engine=eager: an H100's time for a layer, which is its host's")
    return _speed(1 / step, eager, shape, card, "eager", error, why)


def fast_training(config: Mapping[str, Any], shape: Shape, card: Card) -> Speed | None:
    """Optimizer steps a second with ``trainer=fast``, divided as the configuration is; None where nothing tells."""
    # Experts are refused there, and what was measured was in bfloat16: a card without it trains without graphs.
    has = shape.kind in GRAPH_KINDS and config["dtype"] == "bfloat16" and card.compute_capability >= TRITON
    pace = measurements.fast_training_pace(config) if has else None
    least = bounds.step_time(config, shape, card)
    if pace is None or least.value is None:
        return None
    how = pace.config
    theirs = divided(config, how["micro_batch"], how["accumulation"], how["checkpointing"])
    theirs = with_batch({**theirs, "model": _model()}, length=how["tokens"])
    measured = Shape.of(theirs["model"])
    share = float(bounds.step_time(theirs, measured, _measured_on()).value or 0.0) * pace.rate
    same = config["data"]["max_length"] == how["tokens"]
    same &= bounds.training_flops(config, shape) == bounds.training_flops(theirs, measured)
    why = f"trainer=fast: an H100's share of its peak ({pace.place}, n = {pace.n}); held against no other card"
    return _speed(share / least.value, pace, shape, card, None, None, why, same)


def training(config: Mapping[str, Any], shape: Shape, card: Card) -> Speed:
    """Optimizer steps a second with ``trainer=default``."""
    pace = measurements.training_pace(config)
    if pace is None:
        what = f"adapter={config['adapter']['name']} on quant={config['quant']['name']} in {config['dtype']}"
        unknown = Reading.unknown("steps/s", f"{what} was not measured on a GPU")
        return Speed(unknown, Reading.unknown("J/step", str(unknown.reason)))
    least = bounds.step_time(config, shape, card)
    if least.value is None:
        unknown = Reading.unknown("steps/s", str(least.reason))
        return Speed(unknown, Reading.unknown("J/step", str(least.reason)))
    theirs = bounds.step_time(pace.config, Shape.of(pace.config["model"]), _measured_on())
    share = float(theirs.value or 0.0) * pace.rate
    error, why = _held_against("training", "an H100's share of its peak")
    same = config["data"]["max_length"] == pace.config["data"]["max_length"]
    same &= bounds.training_flops(config, shape) == bounds.training_flops(pace.config, Shape.of(pace.config["model"]))
    return _speed(share / least.value, pace, shape, card, None, error, why, same)


def _graph_pace(config: Mapping[str, Any]) -> Pace | None:
    """That of this quantization in as many bits: others have other kernels."""
    pace = measurements.graph_pace(config["quant"])
    if pace is None:
        return None
    shape = Shape.from_architecture(measurements.MODEL, _architecture())
    weights = read_bytes(shape, {**config, "dtype": "bfloat16"}, 0)
    return pace if abs(weights / pace.config["weight_bytes"] - 1) < SAME_BITS else None


def _share_of_bandwidth(pace: Pace) -> float:
    """Of the data sheet's, on the card and model that it was measured on."""
    read = pace.config["weight_bytes"] + pace.config["cache_bytes"]
    return float(pace.rate * read / (_measured_on().bandwidth * 1e9))


def _model() -> dict[str, Any]:
    found: dict[str, Any] = next(iter(measurements.records(measurements.EAGER)))[1].config["model"]
    return found


def _architecture() -> dict[str, Any]:
    found: dict[str, Any] = _model()["architecture"]
    return found


def _measured_on() -> Card:
    return load_catalogue()[measurements.CARD]


def _held_against(kind: str, what: str) -> tuple[tuple[float, float], str]:
    held = constants()["speed_error"][kind]
    low, high = held["lowest"], held["highest"]
    return (low, high), f"{what}; {low:+.0%} to {high:+.0%} against {held['against']} (n = {held['n']})"


def _speed(
    rate: float,
    pace: Pace,
    shape: Shape,
    card: Card,
    engine: str | None,
    error: tuple[float, float] | None,
    why: str,
    same: bool = True,
) -> Speed:
    """As measured where this card and shape are those of the record, else as predicted."""
    unit, each = ("steps/s", "J/step") if engine is None else ("tokens/s", "J/token")
    measured_shape = Shape.from_architecture(shape.name, _architecture())
    if same and card.name == measurements.CARD and shape == measured_shape:
        method = f"{MEASURED}, {pace.place}"
        energy = (
            Reading(pace.joules, each, method, n=pace.n)
            if pace.joules is not None
            else Reading.unknown(each, f"{pace.place} has no energy")
        )
        return Speed(Reading(pace.rate, unit, method, n=pace.n), energy, engine, None, f"measured: {pace.place}")
    energy = Reading(card.power_limit / rate, each, f"{AT_MOST}, the card's power limit of {card.power_limit:g} W")
    return Speed(Reading(rate, unit, f"{PREDICTED}, from {pace.place}"), energy, engine, error, why)
