"""optimum-benchmark's ``benchmark_report.json``.

Targets are those of ``optimum_benchmark/scenarios/inference/scenario.py`` (text generation) and of
``scenarios/training/scenario.py``; a target's measurements those of ``optimum_benchmark/benchmark/report.py``; the keys
of each, and that all of a latency's and of an energy's are required, are from
``optimum_benchmark/trackers/latency.py``, ``memory.py`` and ``energy.py`` (huggingface/optimum-benchmark).
"""

from __future__ import annotations

from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.records.schema import Reading, Record

INFERENCE = ("load_model", "first_generate", "generate", "prefill", "decode", "per_token")
TRAINING = ("overall", "warmup", "train")
MEASUREMENTS = ("memory", "latency", "throughput", "energy", "efficiency")
# Its key for each of our peaks; MB are 10^6 bytes there.
_MEMORY = {
    "max_ram": "resident_set_peak",
    "max_global_vram": "device_memory_peak",
    "max_process_vram": "process_memory_peak",
    "max_reserved": "torch_reserved_peak",
    "max_allocated": "torch_allocated_peak",
}
_MB_IN_GB = 1000.0
_SPREAD = "needs every observation, and the record keeps their mean: null"


def report(record: Record) -> tuple[dict[str, Any], list[str]]:
    """The report of an inference or a training run, and what stays null in it.

    Raises:
        Refusal: for a run of another task.
    """
    missing = [
        "energy, efficiency: an energy there is of processor, memory and card together, and not all three were metered",
    ]
    if record.task == "infer":
        targets = _targets(INFERENCE)
        _inference(record, targets, missing)
    elif record.task == "train":
        targets = _targets(TRAINING)
        _training(record, targets, missing)
    else:
        raise Refusal(f"optimum-benchmark's report is of inference or training, not of {record.task}: give such a run")
    return targets, missing


def _targets(names: tuple[str, ...]) -> dict[str, Any]:
    return {name: dict.fromkeys(MEASUREMENTS) for name in names}


def _inference(record: Record, targets: dict[str, Any], missing: list[str]) -> None:
    targets["load_model"]["latency"] = _latency(record, "load_time", "load_model", missing, single=True)
    targets["prefill"]["latency"] = _latency(record, "time_to_first_token", "prefill", missing)
    memory = _memory(record, "generate, decode", missing)
    # As there: one peak stands for the whole of generating.
    targets["generate"]["memory"] = memory
    targets["decode"]["memory"] = memory
    targets["prefill"]["throughput"] = _throughput(record, "prefill_tokens_per_second", "tokens/s", "prefill", missing)
    targets["decode"]["throughput"] = _throughput(record, "decode_tokens_per_second", "tokens/s", "decode", missing)
    turns, seconds = record.counts.get("turns"), _value(record, "measured_time")
    if turns and seconds:
        targets["generate"]["throughput"] = {"unit": "samples/s", "value": turns / seconds}
    else:
        missing.append("generate.throughput: the record lacks turns or measured_time")
    missing += [f"{name}.latency: {_SPREAD}" for name in ("generate", "decode", "per_token")]
    missing.append("first_generate: the first answer is part of the warm-up, and is not measured by itself")


def _training(record: Record, targets: dict[str, Any], missing: list[str]) -> None:
    memory = _memory(record, "overall, train", missing)
    targets["overall"]["memory"] = memory
    targets["train"]["memory"] = memory
    targets["train"]["throughput"] = _throughput(record, "steps_per_second", "steps/s", "train", missing)
    missing.append(f"overall.latency, warmup, train.latency: {_SPREAD}")


def _value(record: Record, name: str) -> float | None:
    reading = record.readings.get(name)
    return None if reading is None else reading.value


def _why(reading: Reading | None, name: str) -> str:
    return f"the record holds no {name}" if reading is None else str(reading.reason)


def _latency(record: Record, name: str, target: str, missing: list[str], single: bool = False) -> dict[str, Any] | None:
    """Of a single observation, whose every percentile it is; of more the record has no list."""
    reading = record.readings.get(name)
    if reading is None or reading.value is None:
        missing.append(f"{target}.latency: {_why(reading, name)}")
        return None
    if not single and reading.n != 1:
        missing.append(f"{target}.latency: {_SPREAD}")
        return None
    ranks = dict.fromkeys(("total", "mean", "p50", "p90", "p95", "p99"), reading.value)
    return {"unit": "s", "values": [reading.value], "count": 1, **ranks, "stdev": 0.0, "stdev_": 0.0}


def _throughput(record: Record, name: str, unit: str, target: str, missing: list[str]) -> dict[str, Any] | None:
    reading = record.readings.get(name)
    if reading is None or reading.value is None:
        missing.append(f"{target}.throughput: {_why(reading, name)}")
        return None
    return {"unit": unit, "value": reading.value}


def _memory(record: Record, target: str, missing: list[str]) -> dict[str, Any] | None:
    """The peaks of the measured phase where the record has them; without ``max_ram``, which is required, none."""
    found: dict[str, Any] = {"unit": "MB"}
    for key, name in _MEMORY.items():
        reading = record.readings.get(f"measured_{name}") or record.readings.get(name)
        value = None if reading is None else reading.value
        found[key] = None if value is None else value * _MB_IN_GB
        if value is None:
            missing.append(f"{target}.memory.{key}: {_why(reading, name)}")
    return found if found["max_ram"] is not None else None
