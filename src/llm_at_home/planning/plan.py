"""A plan: what a configuration takes of a card, what else would fit there, and what the run costs at least.

Every figure is a reading with its method, as in a run's record, so that it can stand beside what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llm_at_home.adapters import compatibility
from llm_at_home.errors import Refusal
from llm_at_home.hardware.catalogue import Card
from llm_at_home.hardware.device import resolve_dtype
from llm_at_home.planning import bounds, search
from llm_at_home.planning.inference import predict_answers
from llm_at_home.planning.prediction import METHOD, PARTS, Prediction
from llm_at_home.planning.shape import Shape
from llm_at_home.planning.training import predict_training
from llm_at_home.planning.weights import bits_per_weight
from llm_at_home.quantization import base
from llm_at_home.records.schema import Reading

TASKS = ("train", "infer")
# Where no card is named: one with bfloat16, and the cuBLAS workspace of a large one.
ANY_CAPABILITY = (9, 0)


@dataclass(frozen=True)
class Target:
    """What the plan is for: a card of the catalogue, the GPU that is present, or none in particular.

    Attributes:
        name: of ``gpu=``.
        memory: GB that CUDA offers; None where no card is meant.
        capability: compute capability.
        card: of the catalogue, with prices and speeds; None for others.
    """

    name: str
    memory: float | None
    capability: tuple[int, int]
    card: Card | None = None

    @classmethod
    def of(cls, card: Card) -> Target:
        """A card of the catalogue."""
        return cls(card.name, card.memory, card.compute_capability, card)

    def group(self) -> dict[str, Any]:
        """The ``gpu`` group as checks read it."""
        capability = ".".join(map(str, self.capability))
        return {"name": self.name, "device": "cuda", "memory": self.memory, "compute_capability": capability}


@dataclass(frozen=True)
class Plan:
    """What :func:`make` found.

    Attributes:
        config: what was planned, with ``dtype`` decided.
        fits: None where no card is meant.
        figures: readings by name.
        parts: readings by part; they add up to ``predicted_reserved_peak``.
        smallest_card: name of the smallest card of the catalogue that fits, or None.
        remedy: where it does not fit, what would make it fit.
    """

    config: Mapping[str, Any]
    target: Target
    shape: Shape
    prediction: Prediction
    fits: bool | None
    figures: dict[str, Reading]
    parts: dict[str, Reading]
    smallest_card: str | None
    remedy: str | None = None
    notes: list[str] = field(default_factory=list)


def make(config: Mapping[str, Any], target: Target, cards: Sequence[Card]) -> Plan:
    """Plan a configuration.

    Args:
        config: as ``conf/plan.yaml`` composes it.
        target: what it is to run on.
        cards: of the catalogue, the smallest first.

    Raises:
        Refusal: for what cannot run at all, or what the planner does not know.
    """
    if config["task"] not in TASKS:
        raise Refusal(f"task={config['task']} is unknown: choose one of {', '.join(TASKS)}, chat, finetune")
    settled = settle(config, target)
    shape = Shape.of(settled["model"])
    prediction = predict(settled, target.capability)
    fits = prediction.fits(target.memory)
    figures = peaks(prediction) | {
        "parameters": Reading(float(shape.parameters), "1", METHOD),
        "bits_per_weight": Reading(bits_per_weight(shape, settled["quant"], settled["dtype"]), "bits", METHOD),
    }
    remedy = None
    if config["task"] == "train":
        figures |= _training(settled, shape, prediction, target)
        if fits is False and target.memory is not None:
            remedy = _remedy(settled, target.memory, target.capability)
    else:
        figures |= _answering(settled, shape, target)
    parts = {name: _gb(prediction.parts[name]) for name in PARTS if prediction.parts.get(name)}
    smallest = _smallest(config, cards)
    return Plan(settled, target, shape, prediction, fits, figures, parts, smallest, remedy, list(prediction.notes))


def settle(config: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """The configuration for this card: its dtype decided, and refused where it cannot run.

    Raises:
        Refusal: with one line that says what to change.
    """
    group = target.group()
    settled = {**config, "gpu": group, "dtype": _dtype(config, group)}
    if config["task"] == "infer":
        settled.pop("adapter", None)
    base.check(settled)
    if config["task"] == "train":
        compatibility.check(settled)
    return settled


def _dtype(config: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    """``auto`` is the card's own, or the first that the quantization's kernels take."""
    dtype = resolve_dtype(config["dtype"], group)
    taken = config["quant"].get("dtypes")
    return taken[-1] if config["dtype"] == "auto" and taken and dtype not in taken else dtype


def predict(config: Mapping[str, Any], capability: tuple[int, int]) -> Prediction:
    """The peaks of a settled configuration."""
    if config["task"] == "train":
        return predict_training(config, capability)
    if config["engine"]["name"] == "llamacpp":
        raise Refusal("the planner predicts what torch takes, and quant=gguf runs in llama.cpp: use quant=nf4, say")
    rows, new = config["engine"]["batch_size"], config["engine"]["max_new_tokens"]
    return predict_answers(Shape.of(config["model"]), config, rows, prompt_tokens(config), new, capability)


def prompt_tokens(config: Mapping[str, Any]) -> int:
    """Tokens of a prompt.

    Raises:
        Refusal: for questions whose lengths are not known without a tokenizer.
    """
    questions = config["questions"]
    if "prompt_tokens" not in questions:
        raise Refusal(
            f"questions={questions['name']} are of unknown length here: use questions=synthetic and "
            "questions.prompt_tokens=N"
        )
    return int(questions["prompt_tokens"])


def peaks(prediction: Prediction) -> dict[str, Reading]:
    """The predicted peaks under the measured ones' names."""
    found = {
        "predicted_torch_allocated_peak": _gb(prediction.allocated),
        "predicted_torch_reserved_peak": _gb(prediction.reserved),
        "predicted_process_memory_peak": _gb(prediction.process),
    }
    return found | ({"predicted_host_memory": _gb(prediction.host)} if prediction.host else {})


def _gb(value: float) -> Reading:
    return Reading(value / 1e9, "GB", METHOD)


def _training(config: Mapping[str, Any], shape: Shape, prediction: Prediction, target: Target) -> dict[str, Reading]:
    time = bounds.run_time(config, shape, target.card)
    found = {
        "trainable_parameters": Reading(float(prediction.trained), "1", METHOD),
        "step_time_at_least": bounds.step_time(config, shape, target.card),
        "run_time_at_least": time,
        "run_cost_at_least": bounds.run_cost(time, target.card),
    }
    if target.memory is None:
        unknown = Reading.unknown("1", bounds.NO_CARD, METHOD)
        return found | {"largest_micro_batch": unknown, "longest_context": unknown}
    batch = search.largest_micro_batch(config, target.memory, target.capability)
    length = search.longest_context(config, target.memory, target.capability)
    nothing = Reading.unknown("1", f"not even one fits gpu={target.name}", METHOD)
    return found | {
        "largest_micro_batch": Reading(float(batch), "1", METHOD) if batch else nothing,
        "longest_context": Reading(float(length), "tokens", METHOD) if length else replace(nothing, unit="tokens"),
    }


def _answering(config: Mapping[str, Any], shape: Shape, target: Target) -> dict[str, Reading]:
    asked, new = prompt_tokens(config), config["engine"]["max_new_tokens"]
    rate = bounds.decode_rate(config, shape, asked, target.card)
    found = {"decode_tokens_per_second_at_most": rate}
    if target.memory is None:
        unknown = Reading.unknown("1", bounds.NO_CARD, METHOD)
        return found | {"largest_batch": unknown, "longest_context": unknown}
    memory, capability = target.memory, target.capability

    def fits(rows: int, prompt: int) -> bool:
        return bool(predict_answers(shape, config, rows, prompt, new, capability).fits(memory))

    most = max(1, (shape.longest or search.MOST_TOKENS) - new)
    rows = config["engine"]["batch_size"]
    batch = search.largest(lambda size: fits(size, asked), search.MOST_ROWS)
    length = search.largest(lambda prompt: fits(rows, prompt), most)
    nothing = Reading.unknown("1", f"not even one fits gpu={target.name}", METHOD)
    return found | {
        "largest_batch": Reading(float(batch), "1", METHOD) if batch else nothing,
        "longest_context": Reading(float(length + new), "tokens", METHOD)
        if length
        else replace(nothing, unit="tokens"),
    }


def _smallest(config: Mapping[str, Any], cards: Sequence[Card]) -> str | None:
    """The smallest card that fits among those whose chips can run it."""
    for card in cards:
        target = Target.of(card)
        try:
            settled = settle(config, target)
        except Refusal:
            continue
        if predict(settled, card.compute_capability).fits(card.memory):
            return card.name
    return None


def _remedy(config: Mapping[str, Any], memory: float, capability: tuple[int, int]) -> str:
    try:
        choice = search.choose(config, memory, capability)
    except Refusal as refusal:
        return str(refusal)
    words = f"data.batch_size={choice.micro_batch} callbacks.accumulation.steps={choice.accumulation}"
    return f"it fits with {words} memory.checkpointing={choice.checkpointing}, or trainer.micro_batch=auto"
