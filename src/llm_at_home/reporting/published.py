"""The paper's figures, and what a run's come to at the paper's number of tokens."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml

from llm_at_home.records.schema import Reading, Record
from llm_at_home.reporting import facts

#: The file that holds the published figures, to which each of them links.
SOURCE = Path(__file__).with_name("published.yaml")
#: What stands in the place of a figure that was published as "out of memory".
OUT_OF_MEMORY = "oom"


@functools.cache
def _published() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(SOURCE.read_text(encoding="utf-8"))
    return found


def table1() -> dict[str, Any]:
    """The paper's Table I: ``device``, ``workload``, ``generated_tokens`` and ``rows``."""
    found: dict[str, Any] = _published()["table_1"]
    return found


def table3() -> dict[str, Any]:
    """The paper's Table III: ``device``, ``workload``, ``steps`` and ``rows``."""
    found: dict[str, Any] = _published()["table_3"]
    return found


def grades_table(tuned: bool) -> dict[str, Any]:
    """The paper's Table II, or IV of the fine-tuned models: ``workload`` and ``rows``."""
    found: dict[str, Any] = _published()["table_4" if tuned else "table_2"]
    return found


def errata(table: int) -> list[str]:
    """What is known to be wrong or unsaid in the printed figures of a table."""
    return [one["text"] for one in _published()["errata"] if one["table"] == table]


def human_grades(quant: str, adapter: str) -> dict[str, Any] | None:
    """The row of Table II with this quantization, or, of a fine-tuned model, the row of Table IV; None without one.

    ``grades`` maps MT-bench's question ids to mean grades; ``mean`` is over them.
    """
    bare = adapter == "none"
    rows = _published()["table_2" if bare else "table_4"]["rows"]
    return next((row for row in rows if row["quant"] == quant and (bare or row["adapter"] == adapter)), None)


def article_memory() -> dict[str, Any]:
    """What the company article says of memory: ``rows`` for inference, and ``full_finetuning_gb_per_billion``."""
    found: dict[str, Any] = _published()["article_memory"]
    return found


def counterpart(record: Record) -> dict[str, Any] | None:
    """The row of Table I with this quantization (and, of dense weights, this dtype), or None."""
    return _alike(record, table1()["rows"])


def finetuning_counterpart(record: Record) -> dict[str, Any] | None:
    """The row of Table III with this adapter and quantization (and, of dense weights, this dtype), or None."""
    name = facts.name_at(record.config, "adapter", "name")
    return _alike(record, [row for row in table3()["rows"] if row["adapter"] == name])


def _alike(record: Record, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    if facts.pruning(record):
        return None  # nothing was pruned in the paper
    dtype = facts.name_at(record.config, "dtype")
    if not facts.has_published_bits(record):
        return None
    alike = (row for row in rows if row["quant"] == facts.quant(record))
    return next((row for row in alike if row["dtype"] in (None, dtype)), None)


def scaled_energy(record: Record) -> Reading | None:
    """Wh of as many tokens as the paper's, at this run's J/token; None where the record has no such figure."""
    return _scaled(record, record.readings.get("energy_per_token"), "Wh")


def scaled_time(record: Record) -> Reading | None:
    """Hours for as many tokens as the paper's, prompts included, at this run's rate; None where it has none."""
    rate = record.readings.get("output_tokens_per_second")
    if rate is not None and rate.value:
        rate = Reading(1 / rate.value, "s/token", rate.method)
    return _scaled(record, rate, "h")


def scaled_training_energy(record: Record) -> Reading | None:
    """Wh of as many optimizer steps as the paper's, at this run's J/step; None where the record has no such figure."""
    share = record.readings.get("energy_per_step")
    if share is None or share.value is None:
        return None if share is None else Reading.unknown("Wh", share.reason or "", share.method)
    return Reading(share.value * table3()["steps"] / 3600, "Wh", f"{share.method}, {_steps(record)}")


def scaled_training_time(record: Record) -> Reading | None:
    """Hours for as many optimizer steps as the paper's, at this run's rate; None where it has none."""
    pace = record.readings.get("steps_per_second")
    if pace is None or not pace.value:
        return None
    return Reading(table3()["steps"] / pace.value / 3600, "h", f"{pace.method}, {_steps(record)}")


def _steps(record: Record) -> str:
    made = facts.at(record.counts, "optimizer_steps")
    sample = f"{made:,}" if isinstance(made, int) else "an unknown number of"
    return f"scaled from {sample} steps to {table3()['steps']:,}"


def _scaled(record: Record, share: Reading | None, unit: str) -> Reading | None:
    """J or s a token to Wh or h."""
    if share is None:
        return None
    if share.value is None:
        return Reading.unknown(unit, share.reason or "", share.method)
    tokens, made = table1()["generated_tokens"], facts.at(record.counts, "generated_tokens")
    sample = f"{made:,}" if isinstance(made, int) else "an unknown number of"
    method = f"{share.method}, scaled from a sample of {sample} tokens to {tokens:,}"
    return Reading(share.value * tokens / 3600, unit, method)
