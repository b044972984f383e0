"""What became of each job of a command, gathered so that any Hydra launcher can be used, and summed up at the end."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from llm_at_home.records.schema import Reading, Record

JOBS = "jobs.jsonl"

# The figures of a job's one-line summary, in this order, where the record has them.
HEADLINE = (
    "decode_tokens_per_second",
    "steps_per_second",
    "resident_set_peak",
    "torch_allocated_peak",
    "energy_gross",
    "loss_first",
    "loss_last",
    "exact_match",
    "token_f1",
    "refusal_recall",
    "false_refusal_rate",
    "perplexity_home_bench",
    "judge_score_mean",
    "win_rate",
)


@dataclass
class Outcome:
    """How one job ended: a record's status, or ``refused``, or ``skipped``."""

    overrides: list[str]
    folder: str
    status: str = "failed"
    seconds: float = 0.0
    message: str = ""


_outcomes: list[Outcome] = []
_sweep_dir: Path | None = None


def note(outcome: Outcome, sweep_dir: Path | None) -> None:
    """Remember an outcome; in a sweep also in its folder, since a launcher may run jobs in other processes."""
    if sweep_dir is None:
        _outcomes.append(outcome)
        return
    with (sweep_dir / JOBS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")


def outcomes() -> list[Outcome]:
    """The outcomes known to this process."""
    return list(_outcomes)


def exit_code() -> int:
    """0 when every job left a record that counts as done (out of memory among them), 1 a job failed, 2 refused."""
    statuses = {outcome.status for outcome in _outcomes}
    if statuses & {"failed", "timed_out", "interrupted"}:
        return 1
    return 2 if "refused" in statuses else 0


class SweepSummary(Callback):
    """A Hydra callback that prints, at the end of ``-m``, how each job ended."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the sweep's folder, which jobs write to."""
        global _sweep_dir
        _sweep_dir = Path(config.hydra.sweep.dir)
        _sweep_dir.mkdir(parents=True, exist_ok=True)
        (_sweep_dir / JOBS).unlink(missing_ok=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Read what the jobs noted and print it."""
        print_summary()


def print_summary() -> None:
    """How each job of this command's sweep ended, those that are still to come not among them; nothing without one."""
    path = _sweep_dir / JOBS if _sweep_dir else None
    if path is not None and path.is_file():
        _outcomes[:] = [Outcome(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        print(summary(_outcomes))


def summary(jobs: list[Outcome]) -> str:
    """One line a job and one line of counts."""
    lines = [
        f"  {job.status:14} {job.seconds:7.1f} s  {' '.join(job.overrides)}{'  ' + job.message if job.message else ''}"
        for job in jobs
    ]
    counts = ", ".join(f"{n} {status}" for status, n in sorted(Counter(job.status for job in jobs).items()))
    return "\n".join([f"{len(jobs)} jobs: {counts}", *lines])


def headline(record: Record, folder: str) -> str:
    """One line about a record: status, where it is, and its main figures."""
    figures = {**record.readings, **record.quality}
    shown = [f"{name} {_figure(figures[name])}" for name in HEADLINE if name in figures and _known(figures[name])]
    error = f"  {record.error['type']}: {record.error['message']}" if record.error else ""
    return f"{record.status}: {folder}{error}" + "".join(f"\n    {line}" for line in shown)


def _known(reading: Reading) -> bool:
    return reading.value is not None


def _figure(reading: Reading) -> str:
    unit = "" if reading.unit == "1" else f" {reading.unit}"
    return f"{reading.value:.4g}{unit}"
