"""What committed records say of quality and of speed, for predictions on other cards and models."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.quantization.gptq_kernels import KERNELS
from llm_at_home.records import store
from llm_at_home.records.schema import Reading, Record

RESULTS = Path(__file__).resolve().parents[3] / "results"
METHODS, HANDBOOK = "two_core_cpu/methods", "two_core_cpu/handbook"
DECODE, EAGER, TRAINING, FAST = "h100/decode", "h100/table1", "h100/table3", "h100/finetune"
PAPER = "h100/paper"  # what make paper ran of methods that table1 lacks
CARD = "h100"  # of conf/gpu, on which speeds were measured
SMALL_RANK = 16  # below it an adapter has far fewer parameters than those that learned the handbook
MARLIN = KERNELS["gptq_marlin"]
MODEL = "llama2_7b"  # whose shape they were measured on, with random weights


# Rows of benchmarks/finetune.py, by adapter and quantization.
FAST_ROWS = {
    ("lora", "none"): ("lora",),
    ("lora", "nf4"): ("qlora", "qlora_16gb", "qlora_6gb"),
    ("lora", "nf4_nested"): ("qlora_6gb",),
    ("lokr", "none"): ("lokr",),
    ("adalora", "none"): ("adalora",),
}


@dataclass(frozen=True)
class Pace:
    """A measured speed.

    Attributes:
        rate: tokens/s of one conversation, or optimizer steps/s.
        joules: for each of them; None where it was not metered.
        config: of the record, as far as it says what a step reads or computes.
        place: where it lies below ``results/``.
        n: passes or steps.
    """

    rate: float
    joules: float | None
    config: Mapping[str, Any]
    place: str
    n: int


def kl_divergence(quant: Mapping[str, Any], dtype: str) -> Reading:
    """What this quantization loses on the embedded model, nats/token; unknown where it was not measured."""
    alike = [record for record in _quality() if _same_quant(record.config["quant"], quant)]
    dense = [record for record in alike if record.config["dtype"] == dtype]
    for record in dense if quant["method"] == "dense" else dense + alike:
        return record.quality["kl_divergence_mean"]
    return Reading.unknown("nats/token", f"not measured for {' '.join(map(str, _key(quant)[:2]))}")


def exact_match(adapter: Mapping[str, Any]) -> Reading:
    """The share of the handbook's facts that the embedded model, unquantized, answers after training this adapter."""
    folder = RESULTS / HANDBOOK / str(adapter["name"]) / "text"
    if not (folder / store.RECORD).is_file():
        return Reading.unknown("1", f"not measured for adapter={adapter['name']}")
    if adapter.get("r", SMALL_RANK) < SMALL_RANK:
        return Reading.unknown("1", f"not measured for adapter={adapter['name']} of rank {adapter['r']}")
    return store.load(folder).quality["exact_match"]


def graph_pace(quant: Mapping[str, Any]) -> Pace | None:
    """Decoding with ``engine=graph``, by the quantization's name, or None where it was not measured.

    The pace's configuration is the bytes that a step reads, of the weights and of the keys and values.
    """
    path = RESULTS / DECODE / f"{quant['name']}.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    ours, rates = found["contenders"]["ours"], found["contenders"]["ours"]["rates"]
    read = {key: found["limit"][key] for key in ("weight_bytes", "cache_bytes")}
    return Pace(median(rates), median(ours["joules"]), read, f"{DECODE}/{quant['name']}.json", len(rates))


def eager_pace(quant: Mapping[str, Any], dtype: str, capability: tuple[int, int] = MARLIN.capability) -> Pace | None:
    """Decoding one conversation with transformers' ``generate``, or None where it was not measured.

    What was measured with Marlin's kernels tells nothing of a card whose compute capability has others.
    """
    for folder, record in (*records(EAGER), *records(PAPER)):
        config = record.config
        alike = _same_quant(config["quant"], quant) and _same_width(config["dtype"], dtype)
        rate = record.readings.get("decode_tokens_per_second")
        if capability < MARLIN.capability and "Marlin" in str((record.kernel or {}).get("linear")):
            continue
        if alike and config["engine"]["batch_size"] == 1 and rate is not None and rate.value:
            joules = record.readings["energy_per_token"].value
            return Pace(rate.value, joules, config, folder, rate.n or 1)
    return None


def training_pace(config: Mapping[str, Any]) -> Pace | None:
    """Optimizer steps with this base and adapter, or None where they were not measured."""
    for folder, record in records(TRAINING):
        theirs = record.config
        adapter, wanted = theirs["adapter"], config["adapter"]
        alike = adapter["name"] == wanted["name"] and _same_quant(theirs["quant"], config["quant"])
        alike &= adapter.get("implementation") == wanted.get("implementation")
        rate = record.readings.get("steps_per_second")
        if alike and _same_width(theirs["dtype"], config["dtype"]) and rate is not None and rate.value:
            joules = record.readings["energy_per_step"].value
            return Pace(rate.value, joules, theirs, folder, rate.n or record.counts["optimizer_steps"])
    return None


def fast_training_pace(config: Mapping[str, Any]) -> Pace | None:
    """Optimizer steps with ``trainer=fast``, or None where they were not measured.

    Of several rows of this base and adapter, that with the nearest number of tokens at once. The pace's configuration
    is how its step was divided: ``micro_batch``, ``accumulation``, ``checkpointing`` and ``tokens``.
    """
    if config["adapter"].get("implementation") == "peft":
        return None
    recomputed = config["memory"]["checkpointing"] != "none"
    tokens = config["data"]["batch_size"] * config["data"]["max_length"]
    near = []
    for name in FAST_ROWS.get((config["adapter"]["name"], config["quant"]["name"]), ()):
        pace = _fast_row(name)
        how = pace.config
        if (how["checkpointing"] != "none") == recomputed:
            near.append((abs(math.log(how["micro_batch"] * how["tokens"] / tokens)), name, pace))
    return min(near)[2] if near else None


@functools.cache
def _fast_row(name: str) -> Pace:
    place = f"{FAST}/{name}.json"
    found = json.loads((RESULTS / place).read_text(encoding="utf-8"))
    rounds = found["rounds"]["ours"]
    seconds = [second for one in rounds for second in one["seconds"]]
    divided = {**found["planned"], "tokens": found["protocol"]["tokens"]}
    return Pace(1 / median(seconds), median(one["joules"] for one in rounds), divided, place, len(seconds))


def _same_width(one: str, other: str) -> bool:
    """Whether two dtypes are of as many bits: float16 stands in for bfloat16 on cards that lack it."""
    return (one == "float32") == (other == "float32")


def _same_quant(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return _key(one) == _key(other)


def _key(quant: Mapping[str, Any]) -> tuple[Any, ...]:
    keys = ("name", "bits", "target_bits", "type", "scheme", "sym")
    return tuple(quant.get(key) for key in keys)


@functools.cache
def _quality() -> tuple[Record, ...]:
    return tuple(record for _, record in records(METHODS, "*/fidelity"))


@functools.cache
def _read(folder: str, pattern: str) -> tuple[tuple[str, Record], ...]:
    if not RESULTS.is_dir():
        raise Refusal(f"there are no measurements at {RESULTS}: run this from a checkout")
    paths = sorted((RESULTS / folder).glob(f"{pattern}/{store.RECORD}"))
    return tuple((str(path.parent.relative_to(RESULTS)), store.load(path.parent)) for path in paths)


def records(folder: str, pattern: str = "*") -> Iterator[tuple[str, Record]]:
    """Finished runs in a folder below ``results/``, each with its place.

    Raises:
        Refusal: without the checkout that holds them.
    """
    return ((place, record) for place, record in _read(folder, pattern) if record.status == "ok")
