"""From the figures of records to the entries of cells, each unknown with its reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from llm_at_home.records.schema import Reading, Record
from llm_at_home.reporting import facts
from llm_at_home.reporting.cells import NO_READING, Column, Entry, number, unknown
from llm_at_home.reporting.columns import MEMORY, QUANTIZATION, by_key
from llm_at_home.reporting.load import Run

UNRUN = "no inference run of this model, quantization, dtype and device yet: python infer.py"
UNMADE = {
    "make_time": "nothing was made: weights loaded as they are, quantized while loading, or read as published",
    "checkpoint_size": "no quantized checkpoint: weights loaded as they are or quantized while loading",
}
FIDELITY = {
    "perplexity_ratio": "perplexity ratio",
    "kl_divergence_mean": "KL mean",
    "kl_divergence_p99": "KL p99",
    "top1_agreement": "top-1",
}
JUDGE_CHECK = (
    "judge_accuracy",
    "judge_accuracy_single",
    "judge_consistency",
    "judge_position_bias",
    "judge_length_bias",
    "judge_self_preference",
    "judge_aa_score_detectable",
)
SCORES = ("judge_score_mean", "judge_score")


def cost_or_loss(column: Column, run: Run, ran: Run | None) -> Entry:
    """A figure of the fidelity run, or of the inference run that it stands beside."""
    if column.group == "Fidelity":
        return measured(column, run)
    runs = [one for one in (ran, run) if one is not None]
    known = (one for one in runs if (reading := one.record.readings.get(column.key)) and reading.value is not None)
    found = next(known, None)
    if found is None and column.key in UNMADE and any(one.record.status == "ok" for one in runs):
        return unknown(UNMADE[column.key])
    if found is None and ran is None:
        return unknown(UNRUN)
    return measured(column, found or runs[0])


def unmeasured(record: Record) -> str:
    """Why a record lacks a figure that its run could have had."""
    return (
        NO_READING
        if record.status == "ok"
        else f"the run ended ({record.status.replace('_', ' ')}) before this was measured"
    )


def defined_memory(record: Record) -> tuple[str, ...]:
    """The kinds of memory that the record's device has."""
    return facts.CPU_MEMORY if facts.on_cpu(record) else facts.CUDA_MEMORY


def measured(column: Column, run: Run) -> Entry:
    """A figure of a run's record, or why it has none."""
    record = run.record
    if column in MEMORY and column.key not in defined_memory(record):
        return unknown(
            "a figure of CUDA devices; this run was on a CPU"
            if facts.on_cpu(record)
            else "the figure for runs on a CPU; this one was on a card"
        )
    reading = (record.quality | record.readings).get(column.key)
    return column.entry(reading, run.path, missing=unmeasured(record))


def batch_size(run: Run) -> Entry:
    """How many conversations the run answered at once."""
    size = facts.at(run.record.config, "engine", "batch_size")
    if isinstance(size, int) and not isinstance(size, bool):
        return Entry(number(size, 0), float(size), source=run.path)
    return unknown("the engine has no batches of its own")


def scored(column: Column, run: Run | None, missing: str, label: str) -> Entry:
    """A figure of an evaluation, with the label that tells it from others in its cell."""
    if run is None:
        return unknown(missing, label)
    return column.entry(run.record.quality.get(column.key), run.path, label)


def figure(name: str, reading: Reading, run: Run) -> Entry:
    """A figure among the several of an evaluation's cell, whose column can name no unit for all of them."""
    if name in FIDELITY:
        column = by_key(QUANTIZATION, name)
        entry = column.entry(reading, run.path, FIDELITY[name])
        return _with_unit(entry, column.unit)
    share = reading.unit == "1" and any(name.endswith(end) for end in ("match", "f1", "recall", "rate"))
    column = Column(name, name, unit="%" if share else None, decimals=1 if share else 2)
    entry = column.entry(reading, run.path, facts.clean(name).replace("_", " "))
    return _with_unit(entry, column.unit or reading.unit)


def _with_unit(entry: Entry, unit: str | None) -> Entry:
    bare = entry.value is None or unit in (None, "", "1")
    return entry if bare else replace(entry, text=f"{entry.text} {facts.clean(unit)}")


def steps(run: Run) -> Entry:
    """Optimizer steps done, or those planned by a run that finished."""
    # A run that stopped early planned max_steps and did not do them.
    planned = facts.at(run.record.config, "trainer", "max_steps") if run.record.status == "ok" else None
    for value in (facts.at(run.record.counts, "steps"), planned):
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return Entry(number(value, 0), float(value), source=run.path)
    return unknown(unmeasured(run.record))


def headlines(kind: str, quality: Iterable[str]) -> list[str]:
    """Which figures of an evaluation a table shows."""
    if kind == "fidelity":
        # The table of quantizations has the others.
        return [name for name in FIDELITY if name in quality]
    if kind == "judge_check":
        return [name for name in JUDGE_CHECK if name in quality]
    # A judge's record has its figures for each category too: sixteen more, which stay a click away.
    whole = (*SCORES, "win_rate")
    return [
        name
        for name in quality
        if name in whole
        or "_turn_" in name
        or name.startswith("win_rate_of_")
        or not name.startswith(("judge_score_", "win_rate_"))
    ]


def count(record: Record, name: str, source: Path, why: str) -> Entry:
    """A count of a record."""
    value = facts.at(record.counts, name)
    if isinstance(value, int):
        return Entry(number(value, 0), float(value), source=source)
    return unknown(why)
