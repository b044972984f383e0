"""The memory planner against the card: what it says of each run's configuration beside the measured peak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llm_at_home.data.sources import SYNTHETIC
from llm_at_home.errors import Refusal
from llm_at_home.hardware.catalogue import capability
from llm_at_home.records.schema import Reading, Record
from llm_at_home.reporting import facts
from llm_at_home.reporting.cells import Cell, Column, Row, Table, text, unknown
from llm_at_home.reporting.figuredata import Data
from llm_at_home.reporting.load import Loaded, Run
from llm_at_home.reporting.plot import Dot, Plot, lay_out
from llm_at_home.reporting.tables import EMULATED, MARK_NOTES, marks_of

_PEAKS = (("allocated", "torch_allocated_peak", "tensors"), ("process", "process_memory_peak", "process"))
# What a foreign or older configuration can lack on its way through the planner.
_UNPLANNED = (Refusal, KeyError, TypeError, ValueError, AttributeError)
_NAMED = 2.0  # per cent: dots this far off have a label, or labels would hide the rest
_COLUMNS = (
    Column("run", "Run", kind="text"),
    Column("task", "Task", kind="text"),
    Column("model", "Model", kind="text"),
    Column("device", "Device", kind="text"),
    *(
        Column(f"{name}_{key}", title, group, unit=unit, decimals=decimals)
        for name, _, group in (("allocated", "", "Tensors, peak"), ("process", "", "Process, peak"))
        for key, title, unit, decimals in (
            ("predicted", "predicted", "GB", 2),
            ("measured", "measured", "GB", 2),
            ("error", "error", "%", 1),
        )
    ),
)


def table(loaded: Loaded) -> Table | None:
    """A row for each finished run on a GPU whose lengths the planner knows; the largest error of the process first."""
    rows = [row for run in loaded.runs if (row := _row(run))]
    rows.sort(key=lambda row: -abs(_value(row, "process_error")))
    if not rows:
        return None
    return Table(
        "planner",
        "The planner against the card",
        "What the installed planner says of a run's configuration alone, and what was measured. Its two constants "
        "(allocator and CUDA context) are fitted to one folder of training and one of inference runs, which "
        "docs/planner.md names: for those rows, and for the same made again elsewhere, it is a fit, for all others a "
        "prediction. Runs on real data are left out: they take less than their longest conversation would.",
        _COLUMNS,
        tuple(rows),
        MARK_NOTES,
    )


def figure(table: Table) -> Plot | None:
    """Predicted over measured peak of the process, with the line on which a prediction is right."""
    known = [row for row in table.rows if _value(row, "process_measured") > 0 and _value(row, "process_predicted") > 0]
    # Several hosts repeat a configuration; a dot of each once.
    known = list({row.cells["run"].entries[0].text: row for row in known}.values())
    if len(known) < 2:
        return None
    dots = []
    for row in known:
        predicted, measured, error = (
            row.cells[f"process_{key}"].entries[0] for key in ("predicted", "measured", "error")
        )
        label = row.cells["run"].entries[0].text
        told = f"{label}: predicted {predicted.text} GB, measured {measured.text} GB, error {error.text} %"
        y = _value(row, "process_predicted")
        shown = label if abs(_value(row, "process_error")) >= _NAMED else ""
        dots.append(Dot(shown, told, _value(row, "process_measured"), y, (y, y), False))
    ends = [dot.x for dot in dots] + [dot.y for dot in dots]
    worst = max(abs(_value(row, "process_error")) for row in known)
    return lay_out(
        "planner",
        "Predicted over measured peak of the process",
        f"On the dashed line a prediction is right; the largest error of these {len(known)} is {worst:.1f} %. "
        f"Named: {_NAMED:g} % and more. Both axes are logarithmic.",
        ("measured, GB", "predicted, GB"),
        dots,
        Data(
            ("run", "measured, GB", "predicted, GB", "error, %"),
            tuple(
                (row.cells["run"].entries[0].text, dot.x, dot.y, _value(row, "process_error"))
                for dot, row in zip(dots, known, strict=True)
            ),
            tuple(row.source for row in known),
        ),
        line=((min(ends), min(ends)), (max(ends), max(ends))),
    )


def _row(run: Run) -> Row | None:
    record = run.record
    finished = record.status == "ok" and record.task in ("train", "infer")
    # An emulated card holds the allocator to its own memory, which moves what is reserved.
    if not finished or facts.on_cpu(record) or EMULATED in marks_of(record, "planner"):
        return None
    try:
        prediction = _predict(record)
    except _UNPLANNED:
        return None
    cells = {
        "run": text(f"{run.path.parent.parent.name}/{run.path.parent.name}", run.path),
        "task": text(record.task),
        "model": text(facts.model(record)),
        "device": text(facts.device(record)),
    }
    for name, key, _ in _PEAKS:
        predicted = Reading(getattr(prediction, name) / 1e9, "GB", "predicted by the installed planner")
        measured = record.readings.get(key)
        cells[f"{name}_predicted"] = Cell((_column(f"{name}_predicted").entry(predicted, run.path),))
        cells[f"{name}_measured"] = Cell((_column(f"{name}_measured").entry(measured, run.path),))
        if measured is None or measured.value is None or predicted.value is None:
            cells[f"{name}_error"] = Cell((unknown("no measured peak to compare with"),))
            continue
        error = Reading(100 * (predicted.value / measured.value - 1), "%", "predicted over measured")
        cells[f"{name}_error"] = Cell((_column(f"{name}_error").entry(error, run.path),))
    return Row(cells, run.path, marks_of(record, "planner"), run)


def _predict(record: Record) -> Any:
    from llm_at_home.planning.inference import predict_inference
    from llm_at_home.planning.training import predict_training

    chip = capability(facts.at(record.config, "gpu", "compute_capability") or "9.0")
    if record.task == "train":
        if facts.at(record.config, "data", "source") != SYNTHETIC:
            raise Refusal(
                "the planner takes all conversations to be as long as data.max_length, which real ones are not"
            )
        return predict_training(record.config, chip)
    if facts.at(record.config, "engine", "name") not in (None, "eager"):
        raise Refusal("the planner knows engine=eager alone")
    predict: Callable[..., Any] = predict_inference
    return predict(record.config, record.config["questions"]["prompt_tokens"], chip)


def _column(key: str) -> Column:
    return next(column for column in _COLUMNS if column.key == key)


def _value(row: Row, key: str) -> float:
    value = row.cells[key].sort_value
    return value if isinstance(value, float) else 0.0
