"""A plan as text for a terminal, and as plain values for JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from llm_at_home.planning.plan import Plan
from llm_at_home.records.schema import Reading

LABELS = {
    "largest_micro_batch": "largest micro-batch",
    "largest_batch": "largest batch",
    "longest_context": "longest context",
    "step_time_at_least": "a step, at least",
    "run_time_at_least": "the run, at least",
    "run_cost_at_least": "its rent, at least",
    "decode_tokens_per_second_at_most": "decode, at most",
}
# Where a figure is a count of something.
COUNTED = {"largest_micro_batch": "conversations", "largest_batch": "answers"}
BAR = 24


def as_values(plan: Plan) -> dict[str, Any]:
    """The plan as JSON types: readings as in a record."""
    return {
        "model": plan.shape.name,
        "quant": plan.config["quant"]["name"],
        "adapter": plan.config["adapter"]["name"] if "adapter" in plan.config else None,
        "task": plan.config["task"],
        "dtype": plan.config["dtype"],
        "gpu": plan.target.name,
        "memory_gb": plan.target.memory,
        "fits": plan.fits,
        "smallest_card": plan.smallest_card,
        "remedy": plan.remedy,
        "peak_at": plan.prediction.moment,
        "parts": {name: dataclasses.asdict(reading) for name, reading in plan.parts.items()},
        "figures": {name: dataclasses.asdict(reading) for name, reading in plan.figures.items()},
        "notes": plan.notes,
    }


def as_text(plan: Plan) -> str:
    """The plan on one screen."""
    figures = plan.figures
    lines = [_headline(plan), ""]
    total = figures["predicted_torch_reserved_peak"].value or 0.0
    for name, reading in plan.parts.items():
        share = (reading.value or 0.0) / total
        lines.append(f"  {name:<16} {reading.value:8.2f} GB  {'#' * round(BAR * share)}")
    lines += [
        f"  {'torch reserved':<16} {total:8.2f} GB  predicted; the peak is at {plan.prediction.moment}",
        f"  {'process':<16} {figures['predicted_process_memory_peak'].value:8.2f} GB  predicted, with the CUDA context",
    ]
    if "predicted_host_memory" in figures:
        lines.append(f"  {'host':<16} {figures['predicted_host_memory'].value:8.2f} GB  paged or offloaded")
    lines += ["", *_verdict(plan)]
    lines += [f"  {label:<20} {_shown(name, figures[name])}" for name, label in LABELS.items() if name in figures]
    lines += [f"  note: {note}" for note in plan.notes]
    return "\n".join(lines)


def _headline(plan: Plan) -> str:
    config, figures = plan.config, plan.figures
    words = [f"{plan.shape.name}, {plan.shape.parameters / 1e9:.2f}B parameters"]
    words.append(f"quant={config['quant']['name']} ({figures['bits_per_weight'].value:.2f} bits per weight)")
    words.append(f"dtype={config['dtype']}")
    if config["task"] == "train":
        words.append(f"adapter={config['adapter']['name']} ({plan.prediction.trained:,} parameters train)")
        words.append(f"micro-batch {config['data']['batch_size']} x {config['data']['max_length']} tokens")
    else:
        engine, asked = config["engine"], config["questions"]["prompt_tokens"]
        words.append(f"{engine['batch_size']} x ({asked} + {engine['max_new_tokens']}) tokens")
    return ", ".join(words)


def _verdict(plan: Plan) -> list[str]:
    smallest = plan.smallest_card or "none of the catalogue"
    lines = [f"  {'smallest card':<20} {smallest}"]
    if plan.fits is None:
        return [f"  {'fits':<20} no card is named: give gpu=, such as gpu=rtx4090", *lines]
    said = f"{'yes' if plan.fits else 'no'}: gpu={plan.target.name} offers {plan.target.memory:.2f} GB"
    lines.insert(0, f"  {'fits':<20} {said}")
    return lines + ([f"  {'instead':<20} {plan.remedy}"] if plan.remedy else [])


def _shown(name: str, reading: Reading) -> str:
    if reading.value is None:
        return f"unknown: {reading.reason}"
    unit = COUNTED.get(name, reading.unit)
    whole = unit in ("tokens", *COUNTED.values())
    return f"{reading.value:,.0f} {unit}" if whole else f"{reading.value:,.3g} {unit}"
