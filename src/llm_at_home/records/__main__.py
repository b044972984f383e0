"""``python -m llm_at_home.records show FOLDER`` prints what a run left; ``diff A B`` what differs between two.

``export FOLDER --format optimum-benchmark|peft`` prints a record as another project's JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from llm_at_home.errors import Refusal
from llm_at_home.records import store
from llm_at_home.records.export import FORMATS, export
from llm_at_home.records.schema import Reading, Record
from llm_at_home.records.tracking import flatten


def main(argv: list[str] | None = None) -> int:
    """Print a record for a person; exit code 2 when there is none."""
    parser = argparse.ArgumentParser(prog="python -m llm_at_home.records", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print one run's record")
    show.add_argument("folder")
    differ = commands.add_parser("diff", help="print what differs between two runs")
    differ.add_argument("a")
    differ.add_argument("b")
    other = commands.add_parser("export", help="a record as optimum-benchmark's or PEFT's JSON")
    other.add_argument("folder")
    other.add_argument("--format", required=True, choices=FORMATS)
    other.add_argument("--evaluation", help="for peft: the folder of task=text on what the run trained")
    other.add_argument("--out", help="a file to write in place of printing; it must not exist")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "show":
            print(describe(store.load(arguments.folder)))
        elif arguments.command == "export":
            _export(arguments)
        else:
            print(difference(store.load(arguments.a), store.load(arguments.b)))
    except Refusal as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    return 0


def _export(arguments: argparse.Namespace) -> None:
    evaluation = store.load(arguments.evaluation) if arguments.evaluation else None
    exported, missing = export(store.load(arguments.folder), arguments.format, evaluation)
    for line in missing:
        print(f"null: {line}", file=sys.stderr)
    if arguments.out is None:
        print(json.dumps(exported, indent=2))
        return
    out = Path(arguments.out)
    if out.exists():
        raise Refusal(f"{out} exists: give another --out")
    store.write_json(out, exported)


def describe(record: Record) -> str:
    """The record as indented text: status, figures with their methods, kernel and provenance."""
    lines = [f"{record.task}: {record.status}  (config {record.config_hash})"]
    for title, group in (("readings", record.readings), ("quality", record.quality)):
        if group:
            lines.append(title)
            lines += [f"  {name:32} {_figure(reading)}" for name, reading in group.items()]
    for title, values in (("counts", record.counts), ("kernel", record.kernel), ("provenance", record.provenance)):
        if values:
            lines.append(title)
            lines += [f"  {name:32} {value}" for name, value in values.items()]
    if record.error:
        lines += ["error", f"  {record.error.get('type')}: {record.error.get('message')}"]
    return "\n".join(lines + [f"note: {note}" for note in record.notes])


def difference(a: Record, b: Record) -> str:
    """What differs in configuration, kernel and provenance, and every figure of both with its ratio b/a."""
    lines = []
    for title in ("config", "kernel", "provenance"):
        one, other = (flatten({title: getattr(record, title) or {}}) for record in (a, b))
        changed = [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
        lines += [f"{key:44} {one.get(key, '-')}  |  {other.get(key, '-')}" for key in changed]
    if not lines:
        lines = ["configuration, kernel and provenance are the same"]
    figures = [{**record.readings, **record.quality} for record in (a, b)]
    for name in sorted({*figures[0], *figures[1]}):
        first, second = (group.get(name) for group in figures)
        shown = [_figure(reading) if reading else "-" for reading in (first, second)]
        lines.append(f"{name:44} {shown[0]}  |  {shown[1]}{_ratio(first, second)}")
    return "\n".join(lines)


def _ratio(a: Reading | None, b: Reading | None) -> str:
    if a is None or b is None or not a.value or b.value is None:
        return ""
    return f"  (x {b.value / a.value:.3g})"


def _figure(reading: Reading) -> str:
    if reading.value is None:
        return f"unknown: {reading.reason}"
    text = f"{reading.value:.6g} {reading.unit}"
    if reading.interval95:
        text += f" [{reading.interval95[0]:.6g}, {reading.interval95[1]:.6g}]"
    return f"{text}  ({reading.method}{f', n={reading.n}' if reading.n else ''})"


if __name__ == "__main__":
    sys.exit(main())
