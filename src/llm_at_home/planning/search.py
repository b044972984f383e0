"""What would fit: the largest micro-batch, the longest sequence, the smallest card, and the choice for a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.hardware.catalogue import Card
from llm_at_home.planning.prediction import Prediction
from llm_at_home.planning.shape import Shape
from llm_at_home.planning.training import accumulation, predict_training, with_batch

# Beyond these no figure is asked for: a batch or a length that somebody would want.
MOST_ROWS, MOST_TOKENS = 4096, 1 << 20
# Of a card's memory, where a run chooses by it: the planner's own error (docs/planner.md) stays free.
USED = 0.95


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that fits, where all below one that fits do; 0 where not even 1 does."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_micro_batch(config: Mapping[str, Any], memory: float, capability: tuple[int, int]) -> int:
    """Conversations of ``data.max_length`` tokens in a micro-batch that train in so many GB; 0 where none does."""
    return largest(lambda size: _fits(with_batch(config, size=size), memory, capability), MOST_ROWS)


def longest_context(config: Mapping[str, Any], memory: float, capability: tuple[int, int]) -> int:
    """Tokens of each conversation of the configuration's micro-batch that train in so many GB, at most the model's."""
    most = Shape.of(config["model"]).longest or MOST_TOKENS
    return largest(lambda length: _fits(with_batch(config, length=length), memory, capability), most)


def smallest_card(predict: Callable[[Card], Prediction], cards: Iterable[Card]) -> Card | None:
    """The card of least memory that fits, or None.

    Args:
        predict: the prediction on a card.
        cards: by memory, as the catalogue gives them.
    """
    return next((card for card in cards if predict(card).fits(card.memory)), None)


def _fits(config: Mapping[str, Any], memory: float, capability: tuple[int, int]) -> bool:
    return bool(predict_training(config, capability).fits(memory))


@dataclass(frozen=True)
class Choice:
    """A way to train within a card's memory.

    Attributes:
        micro_batch: conversations at once.
        accumulation: micro-batches in an optimizer step; with it the effective batch is what was asked for.
        checkpointing: ``memory.checkpointing``.
        prediction: of it.
    """

    micro_batch: int
    accumulation: int
    checkpointing: str | int
    prediction: Prediction

    def apply(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration with it."""
        return divided(config, self.micro_batch, self.accumulation, self.checkpointing)


def choose(config: Mapping[str, Any], memory: float, capability: tuple[int, int]) -> Choice:
    """Micro-batch, accumulation and checkpointing for the most steps a second within so many GB.

    The effective batch stays. The order of speed is a model and no measurement: a recomputed layer takes one more
    forward pass beside the forward and the backward one, and a micro-batch costs its launches. So the fewest recomputed
    layers come first, and among those the largest micro-batch.

    Raises:
        Refusal: when nothing fits, naming what would make it fit.
    """
    effective = config["data"]["batch_size"] * accumulation(config)
    for checkpointing in _less_recomputing_first(config):
        for size in (size for size in range(effective, 0, -1) if effective % size == 0):
            candidate = divided(config, size, effective // size, checkpointing)
            prediction = predict_training(candidate, capability)
            if prediction.fits(memory):
                return Choice(size, effective // size, checkpointing, prediction)
    raise Refusal(_what_would_fit(config, memory, capability))


def _less_recomputing_first(config: Mapping[str, Any]) -> list[str | int]:
    asked = config["memory"]["checkpointing"]
    if str(config["adapter"].get("_target_")).endswith("PrefixTuningConfig"):
        return ["none"]  # recomputing is refused for it
    order: list[str | int] = ["none", 4, 2, "full"]
    return order[order.index(asked) :] if asked in order else [asked, "full"]


def divided(config: Mapping[str, Any], size: int, steps: int, checkpointing: str | int) -> dict[str, Any]:
    """The configuration with so many conversations at once, micro-batches a step, and recomputed layers."""
    before = config.get("callbacks") or {}
    callbacks = {**before, "accumulation": {**(before.get("accumulation") or {}), "steps": steps}}
    memory = {**config["memory"], "checkpointing": checkpointing}
    return {**with_batch(config, size=size), "callbacks": callbacks, "memory": memory}


# What is tried one after the other, each on top of those before it, to name what would make a run fit.
REMEDIES: tuple[tuple[str, Callable[[dict[str, Any]], dict[str, Any]]], ...] = (
    ("memory.loss_tokens=256", lambda config: {**config, "memory": {**config["memory"], "loss_tokens": 256}}),
    (
        "optimizer=adamw_8bit",
        lambda config: {**config, "optimizer": {**config["optimizer"], "_target_": "bitsandbytes.optim.AdamW8bit"}},
    ),
    ("adapter.r=8", lambda config: {**config, "adapter": {**config["adapter"], "r": min(8, config["adapter"]["r"])}}),
    (
        "quant=nf4_nested",
        lambda config: {
            **config,
            "quant": {
                "name": "nf4_nested",
                "method": "bitsandbytes",
                "bits": 4,
                "config": {"bnb_4bit_use_double_quant": True},
            },
        },
    ),
    ("data.max_length=128", lambda config: with_batch(config, length=min(128, config["data"]["max_length"]))),
)


def _has_rank(config: Mapping[str, Any]) -> bool:
    return "r" in config["adapter"] and str(config["adapter"].get("_target_")).endswith(("LoraConfig", "LoHaConfig"))


def _what_would_fit(config: Mapping[str, Any], memory: float, capability: tuple[int, int]) -> str:
    """One line: what the least way takes, and the first choices that would make it fit."""
    least = divided(config, 1, 1, _less_recomputing_first(config)[-1])
    steps = config["data"]["batch_size"] * accumulation(config)
    least = {**least, "callbacks": {**least["callbacks"], "accumulation": {"steps": steps}}}
    need = predict_training(least, capability).process / 1e9
    said = (
        f"nothing fits {memory:.2f} GB: micro-batches of 1 with every layer recomputed take {need:.2f} GB (predicted)"
    )
    words, changed = [], dict(least)
    trains_all = config["adapter"]["trains"] == "all"
    for word, change in REMEDIES:
        if (trains_all and word.startswith("quant=")) or (word.startswith("adapter.r=") and not _has_rank(config)):
            continue
        before = predict_training(changed, capability).process
        tried = change(changed)
        after = predict_training(tried, capability).process
        if after < before:
            words.append(word)
            changed = tried
        if after <= memory * 1e9:
            return f"{said}; it would fit with {' '.join(words)}"
    hint = "adapter=lora quant=nf4_nested" if trains_all else "a smaller model or a larger gpu"
    return f"{said}; use {hint}"
