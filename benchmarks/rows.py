"""What the tables' scripts share: a row is one run of an entry point, kept when it has a result, and resumable."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from llm_at_home.errors import Refusal
from llm_at_home.records import store
from llm_at_home.records.schema import Reading, Record
from llm_at_home.reporting import facts

ROOT = Path(__file__).resolve().parent.parent
DONE = ("ok", "out_of_memory")
DASH = "–"


def run_row(name: str, command: Sequence[str], out: Path, headline: Sequence[str], keep: Sequence[str] = ()) -> str:
    """Run one row, keep its record below ``out``, and say in a line how it went.

    Args:
        name: of the row, and of its folder.
        command: script and overrides.
        out: where rows are kept.
        headline: the figures to show.
        keep: further files of the run folder that are kept.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="row_") as folder:
        words = [sys.executable, *command, "rerun=true", f"hydra.run.dir={folder}"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        seconds = time.monotonic() - start
        try:
            record = store.load(folder)
        except Refusal:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            return f"{name}: no record after {seconds:.0f} s: {said[-1] if said else f'exit code {done.returncode}'}"
        store.save(record, out / name)
        for file in keep:
            if (Path(folder) / file).is_file():
                (out / name / file).write_bytes((Path(folder) / file).read_bytes())
    figures = {**record.readings, **record.quality}
    shown = ", ".join(f"{text(figures[key], 3)} {figures[key].unit}" for key in headline if has(record, key))
    error = facts.error_line(record)
    return f"{name}: {record.status} in {seconds:.0f} s  {shown}{'  ' + error if error else ''}"


def run_rows(
    rows: Iterable[tuple[str, Sequence[str]]],
    out: Path,
    minutes: float,
    headline: Sequence[str],
    keep: Sequence[str] = (),
) -> int:
    """Run every row that is not there yet, until the time is up; 1 when one left no usable record.

    Args:
        rows: name and command of each, in the order of running.
        out: where rows are kept.
        minutes: no row is started after so many.
        headline: the figures to show.
        keep: further files of each run folder that are kept.
    """
    deadline = time.monotonic() + minutes * 60
    failed = False
    for name, command in rows:
        if status(out / name) in DONE:
            print(f"{name}: is there")
            continue
        if time.monotonic() > deadline:
            print(f"{minutes:g} minutes are up: the same command goes on with {name}")
            break
        print(run_row(name, command, out, headline, keep), flush=True)
        failed |= status(out / name) not in DONE
    return int(failed)


def status(folder: Path) -> str | None:
    """The status of the record in a row's folder, or None where there is none."""
    return store.load(folder).status if (folder / store.RECORD).is_file() else None


def has(record: Record, key: str) -> bool:
    """Whether a record knows a figure."""
    reading = record.readings.get(key) or record.quality.get(key)
    return reading is not None and reading.value is not None


def text(reading: Reading | None, digits: int) -> str:
    """A figure's value, or a dash where it is unknown."""
    return DASH if reading is None or reading.value is None else f"{reading.value:,.{digits}f}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first line its titles."""
    titles, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *rest))
