"""What a run will take: time and energy from the nearest committed record, memory and disk predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_at_home.data.sources import SYNTHETIC
from llm_at_home.errors import Refusal
from llm_at_home.hardware.catalogue import capability
from llm_at_home.models import source
from llm_at_home.planning import plan
from llm_at_home.planning.adapters import trained_parameters
from llm_at_home.planning.inference import predict_inference
from llm_at_home.planning.prediction import METHOD
from llm_at_home.planning.shape import Shape
from llm_at_home.planning.training import predict_training
from llm_at_home.planning.weights import model_bytes
from llm_at_home.quantization.naming import quant_words
from llm_at_home.records.schema import Reading
from llm_at_home.tasks.paper.evidence import RATES, Measured, nearest

TURNS = 2
MT_BENCH = 80
# MT-bench's 80 questions in the paper: published.yaml says how the number follows from its energies.
PAPER_TOKENS_A_TURN = 250
PUBLISHED_BYTES = 2  # of a weight on the hub


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        time: s of the whole process: starting, loading and warming up included.
        energy: Wh, of the measured phase.
        memory: GB, the peak of the process on the card, or on a CPU the resident set.
        disk: GB by what it is for; a thing that several runs share has one name.
        record: the committed record that time and energy are from.
    """

    time: Reading
    energy: Reading
    memory: Reading
    disk: Mapping[str, float]
    record: str | None


def estimate(task: str, config: Mapping[str, Any], needs_making: bool, judged: int = 0) -> Estimate:
    """The estimate of a resolved configuration.

    Args:
        task: train, infer or evaluate.
        config: as ``tasks.resolve`` gives it.
        needs_making: whether a quantized checkpoint must be made first.
        judged: of an evaluation, how many questions were answered.
    """
    disk = _disk(task, config, needs_making)
    found = nearest(task, config)
    if found is None:
        where = "a CPU" if config["gpu"]["device"] == "cpu" else "a GPU"
        method = f"of this method on a model of this size on {where}"
        reason = f"no committed run {'of this judge' if task == 'evaluate' else method}"
        unknown = Reading.unknown("s", reason)
        return Estimate(unknown, Reading.unknown("Wh", reason), _memory(task, config, None), disk, None)
    time, energy = _judged(config, found, judged) if task == "evaluate" else _scaled(task, config, found)
    if needs_making:
        time = _with_making(time, found)
    return Estimate(time, energy, _memory(task, config, found), disk, found.place)


def _scaled(task: str, config: Mapping[str, Any], found: Measured) -> tuple[Reading, Reading]:
    """Time and energy of as many tokens, or optimizer steps, at the record's rates."""
    rate, share = RATES[task], "energy_per_token" if task == "infer" else "energy_per_step"
    units = _tokens(config) if task == "infer" else float(config["trainer"]["max_steps"])
    method = f"measured, {found.place}, scaled"
    pace, joules = found.value(rate), found.value(share)
    time = (
        Reading.unknown("s", found.reason(rate), method)
        if not pace
        else Reading(_around(task, found, pace) + units * _larger(task, config, found) / pace, "s", method, n=1)
    )
    energy = (
        Reading.unknown("Wh", found.reason(share), method)
        if joules is None
        else Reading(joules * units * _larger(task, config, found) / 3600, "Wh", method, n=1)
    )
    return time, energy


def _around(task: str, found: Measured, pace: float) -> float:
    """Seconds of a record's run that were not spent at its pace: starting Python, loading, warming up, writing files.

    At least loading and warming up, where the record does not know the whole run's time, or only that of its last part.
    """
    known = sum(found.value(name) or 0.0 for name in ("load_time", "warmup_time"))
    made = found.record.counts.get("generated_tokens" if task == "infer" else "optimizer_steps", 0)
    return max(known, (found.seconds or 0.0) - made / pace)


def _larger(task: str, config: Mapping[str, Any], found: Measured) -> float:
    """How many times the conversations of the record's optimizer step this one's has; 1 for inference."""
    if task == "infer":
        return 1.0
    sizes = []
    for one in (config, found.record.config):
        steps = one["callbacks"]["accumulation"]["steps"]
        sizes.append(one["data"]["batch_size"] * (steps if isinstance(steps, int) else max(steps.values())))
    return float(sizes[0] / sizes[1])


def _tokens(config: Mapping[str, Any]) -> float:
    """Generated tokens: what the length limit allows, or for long answers what the paper's energies imply."""
    longest, turns = config["engine"]["max_new_tokens"], 1
    if config["questions"]["source"] != SYNTHETIC:
        longest, turns = min(longest, PAPER_TOKENS_A_TURN), TURNS
    return float(questions_of(config) * turns * longest * config["repeats"] * config.get("samples", 1))


def questions_of(config: Mapping[str, Any]) -> int:
    """How many questions an inference run asks."""
    from llm_at_home.data.questions import load_questions

    questions, limit = config["questions"], config["limit"]
    if questions["source"] == SYNTHETIC:
        return int(limit or questions["count"])
    try:
        return len(load_questions(questions["source"], path=questions["path"], ids=questions["ids"], limit=limit))
    except Refusal:
        return int(limit or MT_BENCH)  # where `make setup` has not fetched the file


def _judged(config: Mapping[str, Any], found: Measured, questions: int) -> tuple[Reading, Reading]:
    """A judge's time, at the record's seconds a judgment."""
    method = f"measured, {found.place}, scaled"
    made = found.record.counts.get("judgments")
    energy = Reading.unknown("Wh", "evaluations meter no energy", method)
    if not made or found.seconds is None:
        return Reading.unknown("s", f"{found.place} has no judgments", method), energy
    questions = min(questions, config.get("limit") or questions)
    orders = TURNS if config["judge"]["mode"] == "pairwise" else 1
    return Reading(found.seconds * questions * TURNS * orders / made, "s", method, n=made), energy


def _with_making(time: Reading, found: Measured) -> Reading:
    made = found.value("make_time")
    if made is None or time.value is None:
        return Reading.unknown(
            "s", "a checkpoint is made first, and no committed record says how long that takes", time.method
        )
    return replace(time, value=time.value + made, method=f"{time.method}, and making the checkpoint there")


def _memory(task: str, config: Mapping[str, Any], found: Measured | None) -> Reading:
    if task == "evaluate":
        return Reading.unknown("GB", "a judge's memory is its server's")
    if config["gpu"]["device"] == "cpu":
        value = found.value("resident_set_peak") if found else None
        if found is None or value is None:
            return Reading.unknown("GB", "the planner predicts a GPU's memory, and no committed run says it for a CPU")
        return Reading(value, "GB", f"measured, {found.place}", n=1)
    try:
        chip = capability(config["gpu"].get("compute_capability", "9.0"))
        if task == "train":
            return Reading(predict_training(config, chip).process / 1e9, "GB", METHOD)
        if config["engine"]["name"] == "llamacpp":
            return Reading.unknown("GB", "llama.cpp keeps its own accounts")
        return Reading(predict_inference(config, _prompt(config), chip).process / 1e9, "GB", METHOD)
    except Refusal as refusal:
        return Reading.unknown("GB", str(refusal), METHOD)


def _prompt(config: Mapping[str, Any]) -> int:
    """Tokens of the longest prompt: where questions are text, the first turn's answer and as much again."""
    try:
        return plan.prompt_tokens(config)
    except Refusal:
        return 2 * min(int(config["engine"]["max_new_tokens"]), PAPER_TOKENS_A_TURN)


def _disk(task: str, config: Mapping[str, Any], needs_making: bool) -> dict[str, float]:
    """GB by thing: weights that are downloaded, a checkpoint in the cache, an adapter with its last checkpoint."""
    if task == "evaluate":
        return {}
    model, quant = config["model"], config["quant"]
    try:
        shape = Shape.of(model)
        found = {}
        if model["weights"] == "pretrained" and not _is_here(model):
            found[f"download of {model['source']}"] = PUBLISHED_BYTES * shape.parameters / 1e9
        if needs_making:
            name = ", ".join(quant_words(dict(quant)))
            found[f"checkpoint of {model['name']}: {name}"] = model_bytes(shape, quant, config["dtype"]) / 1e9
        if task == "train" and config["adapter"]["trains"] == "adapter":
            each = 4 * trained_parameters(shape, config["adapter"])
            kept = config["trainer"]["max_steps"] >= config["callbacks"]["checkpoints"]["every_n_steps"]
            # A checkpoint holds AdamW's two moments beside the weights.
            found[f"adapter of {config['adapter']['name']} on {quant['name']}"] = each * (4 if kept else 1) / 1e9
        return found
    except Refusal:
        return {}


def _is_here(model: Mapping[str, Any]) -> bool:
    where = str(model["source"])
    return (
        where == source.EMBEDDED
        or Path(where).expanduser().exists()
        or bool(source.hub_commit(where, model["revision"]))
    )


def total(readings: Sequence[Reading]) -> tuple[float, int]:
    """The sum of what is known, and how many are not."""
    return sum(one.value for one in readings if one.value is not None), sum(one.value is None for one in readings)
