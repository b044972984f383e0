"""Which records a claim is about, and which two of them are alike in everything but what the claim is about."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from llm_at_home.records.schema import Record
from llm_at_home.records.tracking import flatten
from llm_at_home.reporting import facts
from llm_at_home.reporting.claims.claim import Claim
from llm_at_home.reporting.load import Loaded, Run

# What says nothing of the conditions: places, patience, how often and with what it was measured. The card is compared
# by its own name instead of that of its group.
_NO_CONDITION = (
    *("paths", "logger", "hydra", "rerun", "timeout_s", "grace_s", "strict", "metric", "repeats", "gpu", "resume"),
    *("adapter_path", "answers", "baseline", "folder", "config_hash"),
    *(f"callbacks.{name}" for name in ("power", "memory", "progress", "checkpoints", "interruption", "throughput")),
)
_VERSIONS = ("torch", "transformers")


def matching(claim: Claim, loaded: Loaded, side: Mapping[str, Any]) -> list[Run]:
    """The finished runs that are what the claim says of both sides, and of this one.

    A run that a newer one of the same configuration has replaced elsewhere was measured all the same, often on another
    machine.
    """
    wanted = {**claim.records, **side}
    return [
        run
        for run in (*loaded.superseded, *loaded.runs)
        if run.record.status == "ok" and all(_is(run.record, key, value) for key, value in wanted.items())
    ]


def pairs(claim: Claim, loaded: Loaded) -> list[tuple[Run, Run]]:
    """Every two matching runs alike but for what tells a from b and ``varies``; they share what ``same`` names."""
    free = {key.removeprefix("subject.").split(".")[0] for key in (*claim.a, *claim.b)} | set(claim.varies)
    groups: dict[str, tuple[list[Run], list[Run]]] = defaultdict(lambda: ([], []))
    for number, side in enumerate((claim.a, claim.b)):
        for run in matching(claim, loaded, side):
            shared = [_value(run.record, key) for key in claim.same]
            groups[_conditions(run.record, free, claim.figure, shared)][number].append(run)
    return [(a, b) for sides in groups.values() for a in sides[0] for b in sides[1] if a is not b]


def _is(record: Record, key: str, wanted: Any) -> bool:
    value = _value(record, key)
    return value in wanted if isinstance(wanted, list) else value == wanted


def _value(record: Record, key: str) -> Any:
    """What a record says under a claim's key; None where it says nothing."""
    if key == "task":
        return record.task
    if key == "evaluation":
        return facts.at(record.config, "task")
    names = key.split(".")
    if names[0] == "kernel":
        return facts.at(record.kernel, *names[1:])
    if names[0] == "subject":
        return facts.at(record.subject, "config", *names[1:])
    value = facts.at(record.config, *names)
    # An evaluation of a run says what that was in its subject.
    return facts.at(record.subject, "config", *names) if value is None else value


def _conditions(record: Record, free: set[str], figure: str, shared: list[Any]) -> str:
    subject = facts.at(record.subject, "config")
    config = flatten({"own": record.config, "subject": subject if isinstance(subject, dict) else {}})
    left_out = {*_NO_CONDITION, *free}
    kept = {key: value for key, value in config.items() if not _under(key.split(".", 1)[-1], left_out)}
    packages = record.provenance.get("packages") or {}
    machine = [facts.device(record), *(packages.get(name) for name in _VERSIONS)]
    if _depends_on_machine(record, figure):
        cards = record.provenance.get("gpu") or []
        machine += [record.provenance.get("platform"), *(facts.at(card, "uuid") for card in cards)]
    return json.dumps([record.task, kept, machine, shared], sort_keys=True, default=str)


def _under(key: str, names: set[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _depends_on_machine(record: Record, figure: str) -> bool:
    reading = (record.quality | record.readings).get(figure)
    unit = reading.unit if reading else ""
    return unit in ("s", "Wh", "W") or unit.endswith("/s") or unit.startswith("J/")
