"""The list of runs before they start, with what each will take and what all take together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llm_at_home.records.schema import Reading
from llm_at_home.tasks.paper.estimate import Estimate
from llm_at_home.tasks.paper.progress import AFTER, RUN, State

TITLES = ("run", "time", "energy (Wh)", "memory (GB)", "scaled from, below results/")
UNKNOWN = "?"
LARGEST = 3  # things on disk that are named


def as_text(states: Sequence[State]) -> str:
    """A line a run, the totals, and why figures are unknown."""
    lines = ["{:<26} {:>9} {:>12} {:>12}  {}".format(*TITLES)]
    lines += [_line(state) for state in states]
    return "\n".join([*lines, "", *_totals(states), *_commands(states)])


def _line(state: State) -> str:
    name = state.run.name
    if state.estimate is None:
        return f"{name:<26} {state.status}: {state.why}" if state.why != "ok" else f"{name:<26} {state.status}"
    found = state.estimate
    time = UNKNOWN if found.time.value is None else duration(found.time.value)
    figures = [UNKNOWN if one.value is None else f"{one.value:.2f}" for one in (found.energy, found.memory)]
    return f"{name:<26} {time:>9} {figures[0]:>12} {figures[1]:>12}  {found.record or ''}".rstrip()


def _totals(states: Sequence[State]) -> list[str]:
    to_run = [state.estimate for state in states if state.status in (RUN, AFTER) and state.estimate]
    disk = {name: size for found in to_run for name, size in found.disk.items()}
    lines = [
        f"{len(to_run)} of {len(states)} runs are to run.",
        f"time:   {_total([found.time for found in to_run], duration)}",
        f"energy: {_total([found.energy for found in to_run], lambda value: f'{value:,.1f} Wh')}",
        f"disk:   {sum(disk.values()):.2f} GB (predicted){_largest(disk)}",
    ]
    return lines + _caveats(to_run)


def _total(readings: Sequence[Reading], shown: Callable[[float], str]) -> str:
    known = [one.value for one in readings if one.value is not None]
    reasons = sorted({str(one.reason) for one in readings if one.value is None})
    if not known:
        return f"unknown: {'; '.join(reasons)}" if reasons else "nothing to run"
    said = f"about {shown(sum(known))}"
    if reasons:
        said += f", without {len(readings) - len(known)} runs of which it is unknown ({'; '.join(reasons)})"
    return said


def _largest(disk: dict[str, float]) -> str:
    if not disk:
        return ""
    largest = sorted(disk.items(), key=lambda item: -item[1])[:LARGEST]
    said = ", ".join(f"{name} {size:.2f}" for name, size in largest)
    return f": {said}{' ...' if len(disk) > LARGEST else ''}"


def _caveats(found: Sequence[Estimate]) -> list[str]:
    if not any(one.record for one in found):
        return []
    return [
        "Time and energy are scaled from the committed record named, whatever machine made it; two hosts with one card",
        "differed by 1.6 times. Making a checkpoint is taken to be as long as there, whatever its calibration text is.",
        "Memory is predicted for a GPU (error: docs/planner.md), for a CPU that record's.",
    ]


def _commands(states: Sequence[State]) -> list[str]:
    first = next((state for state in states if state.status == RUN), None)
    return [] if first is None else ["The first:", f"  {first.run.command(first.words)}"]


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is read easily."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
