"""Fidelity beside people's grades: whether what is measured against the unquantized model is what people see."""

from __future__ import annotations

from llm_at_home.human.correlation import KINDS
from llm_at_home.reporting import facts, published
from llm_at_home.reporting.cells import Cell, Column, Row, Table, unknown
from llm_at_home.reporting.load import Loaded, Run
from llm_at_home.reporting.paper_grades import NOBODY

_COLUMNS = (
    Column("method", "Method", kind="text"),
    Column("divergence", "KL divergence, mean", "Fidelity, ours", "many", unit="nats/token", decimals=4),
    Column("grade", "ours", "People’s mean grade", better="higher"),
    Column("grade_published", "published", "People’s mean grade"),
)
_UNMEASURED = "no fidelity of this quantization here yet: python evaluate.py task=fidelity"


def table(loaded: Loaded, grades: Table) -> Table:
    """The rows of ``grades``, which is Table II, with the divergence of each method's fidelity runs beside."""
    found = [
        run
        for run in loaded.runs
        if run.record.task == "evaluate" and facts.evaluation(run.record) == "fidelity" and run.record.status == "ok"
    ]
    rows = []
    for printed, row in zip(published.grades_table(False)["rows"], grades.rows, strict=True):
        entries = [
            _COLUMNS[1].entry(run.record.quality.get("kl_divergence_mean"), run.path, _label(run))
            for run in found
            if _is(run, printed["quant"])
        ]
        cells = {
            "method": row.cells["method"],
            "divergence": Cell(tuple(entries) or (unknown(_UNMEASURED),)),
            "grade": row.cells["grade_mean"],
            "grade_published": row.cells["published_mean"],
        }
        rows.append(Row(cells, row.source, (), row.run))
    return Table(
        "fidelity-grades",
        "Fidelity against people’s grades",
        "Lower divergence is closer to the unquantized model. The published grades are of Llama-2-7B-Chat, our "
        "divergences of the models that they name: no correlation is computed across models.",
        _COLUMNS,
        tuple(rows),
    )


def correlations(loaded: Loaded) -> str:
    """The rank correlations that studies hold between fidelity and grades, in words, or why there are none."""
    said = []
    for run in loaded.runs:
        if run.record.task == "human":
            for name, reading in run.record.quality.items():
                # Those with a judge are of another question.
                if name.split("_", 1)[0] in KINDS and "judge" not in name:
                    value = f"{reading.value:.2f}" if reading.value is not None else f"unknown, {reading.reason}"
                    said.append(facts.clean(f"{name.replace('_', ' ')}: {value}"))
    return f"Rank correlations of our studies: {'; '.join(said)}." if said else f"Rank correlation: unknown, {NOBODY}."


def _is(run: Run, quant: str) -> bool:
    record = run.record
    # Other bits of a method are another method to a reader of answers.
    four = facts.has_published_bits(record)
    whole = facts.at(record.config, "limit") is None
    return facts.quant(record) == quant and four and whole and not facts.pruning(record)


def _label(run: Run) -> str:
    record = run.record
    return f"{facts.model(record)}, {facts.name_at(record.config, 'dtype')}, {facts.host(record)}:"
