"""Ours beside the published figures: what was measured, and apart from it what was scaled to the paper's size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.human.means import NOBODY, UNIT, grade_name
from llm_at_home.records import store
from llm_at_home.records.schema import Reading, Record
from llm_at_home.reporting import facts, published
from llm_at_home.tasks.paper.options import Options
from llm_at_home.tasks.paper.progress import LEFT_OUT, REFUSED, Progress
from llm_at_home.tasks.paper.rows import ANSWERS, FINETUNING, INFERENCE, PAIRWISE, SINGLE, Run, runs

JSON, TEXT = "paper.json", "paper.md"
DASH = "–"
NOT_YET = "not run yet"
MEMORY = ("process_memory_peak", "resident_set_peak")
# Figures of each kind of run that was measured; the first of several that is known.
MEASURED: dict[str, dict[str, tuple[str, ...]]] = {
    INFERENCE: {
        "memory": MEMORY,
        "tokens_per_second": ("decode_tokens_per_second",),
        "energy_per_token": ("energy_per_token",),
    },
    FINETUNING: {
        "memory": MEMORY,
        "steps_per_second": ("steps_per_second",),
        "energy_per_step": ("energy_per_step",),
        "energy_gross": ("energy_gross",),
    },
    SINGLE: {"judge_score_mean": ("judge_score_mean",)},
    PAIRWISE: {"win_rate": ("win_rate",)},
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One run beside what the paper published of it.

    Attributes:
        measured: of the run's record.
        extrapolated: the same rates at the paper's number of tokens or steps; each method says from how many.
        published: as printed, or nothing.
        grades: of people: ``ours``, which are unknown until somebody has given some, and ``published``.
    """

    run: Run
    status: str
    why: str
    measured: dict[str, Reading]
    extrapolated: dict[str, Reading]
    published: Mapping[str, Any] | None
    grades: dict[str, Any] | None = None

    def values(self) -> dict[str, Any]:
        """The row as JSON types."""
        plain = {key: dataclasses.asdict(reading) for key, reading in self.measured.items()}
        scaled = {key: dataclasses.asdict(reading) for key, reading in self.extrapolated.items()}
        return {
            **{"run": self.run.name, "row": self.run.row, "kind": self.run.kind, "folder": str(self.run.folder)},
            **{"status": self.status, "why": self.why or None, "measured": plain, "extrapolated": scaled},
            **{"published": self.published, "human_grades": self.grades},
        }


def write(progress: Progress, folder: Path, options: Options) -> str:
    """Write ``paper.json`` and ``paper.md`` into the folder of the runs, and give the text.

    They tell of every row, also where the command ran some alone.
    """
    found = list(_rows(progress, options))
    store.write_json(folder / JSON, {"rows": [row.values() for row in found]})
    text = f"{_title(found)}\n\n{as_markdown(found)}"
    (folder / TEXT).write_text(text, encoding="utf-8")
    return f"{text}\nkept in {folder}: {TEXT}, {JSON}"


def _title(rows: Sequence[Row]) -> str:
    """Whose figures stand beside whose."""
    ours = {
        (facts.model(record), facts.host(record))
        for row in rows
        if (record := _record(row.run.folder)) and row.measured
    }
    said = "; ".join(f"{model} on {host}" for model, host in sorted(ours))
    theirs = f"Llama-2-7B on {published.table1()['device']}"
    return f"# The paper's tables\n\nOurs: {said or 'nothing yet'}. The paper's: {theirs}."


def _rows(progress: Progress, options: Options) -> Iterator[Row]:
    study = _record(Path(options.study))
    for run in runs(dataclasses.replace(options, values={**options.values, "rows": None})):
        status = progress.ended.get(run.name, NOT_YET)
        record = None if status in (LEFT_OUT, REFUSED) else _record(run.folder)
        status = record.status if record is not None else status
        yield row(run, status, progress.why.get(run.name, ""), record, study)


def row(run: Run, status: str, why: str, record: Record | None, study: Record | None) -> Row:
    """A run's row.

    Args:
        run: which.
        status: how it ended.
        why: it did not run, or failed.
        record: of the run, or None.
        study: of a human study that was counted, or None.
    """
    measured: dict[str, Reading] = {}
    extrapolated: dict[str, Reading] = {}
    said = None
    if record is not None:
        measured = {name: _first(record, keys) for name, keys in MEASURED.get(run.kind, {}).items()}
        if run.kind == INFERENCE:
            said = published.counterpart(record)
            scaled = {"energy": published.scaled_energy(record), "time": published.scaled_time(record)}
            extrapolated = {key: reading for key, reading in scaled.items() if reading is not None}
        if run.kind == FINETUNING:
            said = published.finetuning_counterpart(record)
            extrapolated = scaled_training(record)
    # The base model before fine-tuning is in neither Table II nor IV.
    graded = run.kind == INFERENCE or (run.kind == ANSWERS and bool(run.needs))
    grades = _grades(record, study) if graded and record is not None else None
    return Row(run, status, why, measured, extrapolated, said, grades)


def scaled_training(record: Record) -> dict[str, Reading]:
    """Energy (Wh) and time (h) of the paper's steps at a run's rates; nothing for a run that made them all."""
    if record.counts.get("optimizer_steps", 0) >= published.table3()["steps"]:
        return {}
    scaled = {"energy": published.scaled_training_energy(record), "time": published.scaled_training_time(record)}
    return {key: reading for key, reading in scaled.items() if reading is not None}


def _first(record: Record, keys: tuple[str, ...]) -> Reading:
    known = [{**record.readings, **record.quality}.get(key) for key in keys]
    values = [reading for reading in known if reading is not None and reading.value is not None]
    if values:
        return values[0]
    return next(
        (reading for reading in known if reading is not None), Reading.unknown("1", f"the record has no {keys[0]}")
    )


def _record(folder: Path) -> Record | None:
    try:
        return store.load(folder)
    except Refusal:
        return None


def _grades(record: Record, study: Record | None) -> dict[str, Any] | None:
    """People's mean grade of these answers, and the paper's of the same method."""
    quant = record.config["quant"]["name"]
    adapter = _adapter(record)
    said = published.human_grades(quant, adapter) if facts.has_published_bits(record) else None
    ours = Reading.unknown(UNIT, NOBODY)
    for model in study.config["models"] if study is not None else []:
        if model["config_hash"] == record.config_hash and study is not None:
            ours = study.quality.get(grade_name(model["label"]), ours)
    return {"ours": dataclasses.asdict(ours), "published": said}


def _adapter(record: Record) -> str:
    folder = record.config.get("adapter_path")
    if not folder:
        return "none"
    try:
        return str(store.load(folder).config["adapter"]["name"])
    except Refusal:
        return "unknown"


def as_markdown(rows: list[Row]) -> str:
    """Tables of the runs, and why some did not run."""
    of = {kind: [row for row in rows if row.run.kind == kind and row.measured] for kind in MEASURED}
    parts = [
        _table(
            "Table I: inference",
            of[INFERENCE],
            {"memory": ("memory (GB)", 2), "tokens_per_second": ("tokens/s", 1), "energy_per_token": ("J/token", 2)},
            {"energy": ("40,000 tokens, extrapolated (Wh)", 1)},
            {"vram_gb": "memory (GB)", "tokens_per_second": "tokens/s", "energy_wh": "Wh"},
        ),
        _table(
            "Table III: fine-tuning",
            of[FINETUNING],
            {"memory": ("memory (GB)", 2), "steps_per_second": ("steps/s", 3), "energy_per_step": ("J/step", 0)},
            {"energy": ("all steps, extrapolated (Wh)", 0), "time": ("all steps, extrapolated (h)", 1)},
            {"vram_gb": "memory (GB)", "steps_per_second": "steps/s", "energy_wh": "Wh"},
        ),
        _table("MT-bench, single", of[SINGLE], {"judge_score_mean": ("points", 2)}, {}, {}),
        _table("MT-bench, pairwise", of[PAIRWISE], {"win_rate": ("win rate", 3)}, {}, {}),
        _people(rows),
        _not_run(rows),
    ]
    return "\n".join(part for part in parts if part)


def _table(
    title: str,
    rows: list[Row],
    measured: Mapping[str, tuple[str, int]],
    extrapolated: Mapping[str, tuple[str, int]],
    said: Mapping[str, str],
) -> str:
    if not rows:
        return ""
    titles = ["run", *(name for name, _ in (*measured.values(), *extrapolated.values()))]
    titles += [f"paper, {published.table1()['device']}: {name}" for name in said.values()]
    lines = [titles]
    lines.append(["---"] * len(titles))
    for one in rows:
        name = one.run.name if one.status == "ok" else f"{one.run.name} ({one.status.replace('_', ' ')})"
        cells = [_cell(one.measured.get(key), digits) for key, (_, digits) in measured.items()]
        cells += [_cell(one.extrapolated.get(key), digits) for key, (_, digits) in extrapolated.items()]
        printed = one.published or {}
        lines.append([name, *cells, *(DASH if printed.get(key) is None else f"{printed[key]:g}" for key in said)])
    return "\n".join([f"## {title}", "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def _cell(reading: Reading | None, digits: int) -> str:
    return DASH if reading is None or reading.value is None else f"{reading.value:,.{digits}f}"


def _people(rows: list[Row]) -> str:
    """Tables II and IV, of the methods that the paper had graded."""
    graded = [(row, row.grades) for row in rows if row.grades is not None and row.grades["published"]]
    if not graded:
        return ""
    lines = ["## Tables II and IV: people's grades, 1 to 5", "", "| run | ours | paper: mean |", "| --- | --- | --- |"]
    for one, grades in graded:
        ours = grades["ours"]
        shown = f"{ours['value']:.2f}" if ours["value"] is not None else f"{DASH} ({ours['reason']})"
        lines.append(f"| {one.run.name} | {shown} | {grades['published']['mean']:g} |")
    folders = " ".join(str(one.run.folder) for one, _ in graded)
    return "\n".join([*lines, "", f'To have them graded: make rate RUNS="{folders}"', ""])


def _not_run(rows: list[Row]) -> str:
    left = [row for row in rows if row.status not in ("ok", "out_of_memory")]
    if not left:
        return ""
    lines = [
        f"- {row.run.name}: {row.status}{f': {row.why}' if row.why else ''}" for row in left if row.status != NOT_YET
    ]
    waiting = [row.run.name for row in left if row.status == NOT_YET]
    lines += [f"- {NOT_YET}: {', '.join(waiting)}"] if waiting else []
    return "\n".join(["## Not run", "", *lines, ""])
