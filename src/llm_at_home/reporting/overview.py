"""Where the records come from: machines, dates and versions, for the head of the page."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from llm_at_home.reporting import facts
from llm_at_home.reporting.load import Loaded

_PACKAGES = ("llm-at-home", "torch", "transformers", "peft", "bitsandbytes", "gptqmodel", "lightning")


@dataclass(frozen=True)
class Overview:
    """Facts about the whole set of records, each ready to be read."""

    machines: tuple[str, ...]
    dates: str
    versions: tuple[str, ...]
    commits: tuple[str, ...]
    tally: str


def summarize(loaded: Loaded) -> Overview:
    """What machines, days, package versions and commits the records come from."""
    records = [run.record for run in loaded.runs]
    machines = Counter(facts.host(record) for record in records)
    days = sorted({run.when.date().isoformat() for run in loaded.runs})
    commits = Counter(_commit(record.provenance) for record in records)
    tally = [_plural(len(records), "record")]
    tally += (
        [f"{_plural(len(loaded.superseded), 'other run')} of the same config left out"] if loaded.superseded else []
    )
    tally += [f"{_plural(len(loaded.left_out), 'unreadable file')}"] if loaded.left_out else []
    return Overview(
        tuple(f"{name}: {_plural(count, 'record')}" for name, count in machines.most_common()),
        " to ".join(dict.fromkeys((days[0], days[-1]))) if days else facts.UNKNOWN,
        tuple(_versions([facts.at(record.provenance, "packages") for record in records])),
        tuple(commit for commit, _ in commits.most_common()),
        ", ".join(tally),
    )


def _versions(packages: list[object]) -> list[str]:
    said = []
    for name in _PACKAGES:
        found = {facts.name_at(one, name) for one in packages} | {
            facts.name_at(one, name.replace("-", "_")) for one in packages
        }
        found -= {facts.UNKNOWN}
        if found:
            said.append(f"{name} {' and '.join(sorted(found))}")
    return said or [facts.UNKNOWN]


def _commit(provenance: object) -> str:
    commit = facts.name_at(provenance, "git", "commit")
    dirty = " with uncommitted changes" if facts.at(provenance, "git", "dirty") else ""
    return commit if commit == facts.UNKNOWN else commit[:12] + dirty


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
