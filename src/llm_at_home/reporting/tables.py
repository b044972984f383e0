"""From records to the rows of the five tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from llm_at_home.human.means import grade_name
from llm_at_home.records.schema import Record
from llm_at_home.reporting import entries, facts, published
from llm_at_home.reporting.cells import NO_READING, Cell, Column, Row, Table, text, unknown
from llm_at_home.reporting.columns import (
    EVALUATIONS,
    FINETUNING,
    INFERENCE,
    JUDGE_TESTED,
    MEMORY,
    QUANTIZATION,
    UNFINISHED,
    by_key,
)
from llm_at_home.reporting.load import Loaded, Run
from llm_at_home.reporting.trained import Trained

KEYS = ("inference", "finetuning", "quantization", "evaluations", "unfinished")
RANDOM = "random weights"
EMULATED = "emulated card"
DEQUANTIZED = "dequantized weights"
SHORT = "fewer texts"
REDRAWN = "another draw"
MARK_NOTES = {
    RANDOM: "random weights: the architecture without its weights, so memory, speed and energy only",
    EMULATED: "emulated card: memory is a result; speed and energy are those of the host's card",
    DEQUANTIZED: "dequantized weights: fidelity is theirs, without what the format's own kernels round beside",
    SHORT: "fewer texts: limit= kept to the first ones, so its fidelity stands beside no other row's",
    REDRAWN: "another draw: the baseline gave other answers, so own answers stand beside no other draw's",
}
_UNJUDGED = "no judge has scored this run yet: python evaluate.py task=judge answers=RUN_FOLDER"
_UNCOMPARED = "not compared with another run yet: python evaluate.py task=judge with a baseline=RUN_FOLDER"
_UNGRADED = "no study of people's grades holds this run: make rate RUNS=..., then make study"
_NO_JUDGE = "not an evaluation by a judge"
_NO_TEST = "this judge has not been tested yet: python evaluate.py task=judge_check"
_UNTESTED = "after: not scored on its own data and quant yet: python evaluate.py task=text adapter_path=RUN_FOLDER"
_NO_BASE = "before: the model without an adapter has not been scored on this data and quantization"


def build(loaded: Loaded) -> tuple[Table, ...]:
    """The tables of :data:`KEYS`; one without rows is left out."""
    book = _Book(loaded)
    made = (
        _table(
            "inference",
            "Inference",
            "Cost and quality of running each model.",
            INFERENCE,
            book,
            book.inference,
        ),
        _table(
            "finetuning",
            "Fine-tuning",
            "Cost and effect of training each adapter. Quality: the untouched model → after training.",
            FINETUNING,
            book,
            book.finetuning,
        ),
        _table(
            "quantization",
            "Quantization",
            "What each quantization costs, and what it loses against its own unquantized baseline, least lossy first.",
            QUANTIZATION,
            book,
            book.quantization,
        ),
        _table("evaluations", "Evaluations", "Every scoring of a run.", EVALUATIONS, book, book.evaluation),
        _table(
            "unfinished",
            "Runs that didn’t finish",
            "What stopped each run.",
            UNFINISHED,
            book,
            book.unfinished,
        ),
    )
    return tuple(table for table in made if table.rows)


def _table(
    key: str,
    title: str,
    caption: str,
    columns: tuple[Column, ...],
    book: _Book,
    story: Callable[[Run], dict[str, Cell] | None],
) -> Table:
    rows = []
    for run in book.runs:
        cells = story(run)
        if cells is not None:
            rows.append(Row(cells, run.path, marks_of(run.record, key), run))
    if key in ("inference", "finetuning"):
        rows.sort(key=lambda row: str(row.cells["model"].sort_value))
    if key == "quantization":
        rows.sort(key=_by_divergence)
    # A kind of memory that none of the devices defines would be a column of dashes.
    defined = {name for row in rows if row.run for name in entries.defined_memory(row.run.record)}
    columns = tuple(c for c in columns if c not in MEMORY or c.key in defined)
    # Nor does a CPU without a counter tell of energy beside its fidelity.
    if key == "quantization" and all(row.cells["energy_per_token"].sort_value is None for row in rows):
        columns = tuple(c for c in columns if c.key != "energy_per_token")
    # Nor is there anything to tell of people where none were asked.
    columns = tuple(c for c in columns if c.key != "human_grade" or book.studies)
    return Table(key, title, caption, columns, tuple(rows), MARK_NOTES)


class _Book:
    """The runs, looked up the ways that the tables need."""

    def __init__(self, loaded: Loaded):
        self.runs = loaded.runs
        finished = [r for r in loaded.runs if r.record.task == "evaluate" and r.record.status == "ok"]
        self.judged = [r for r in finished if facts.evaluation(r.record) == "judge"]
        self.studies = [r for r in loaded.runs if r.record.task == "human"]
        self.checks = [r for r in finished if facts.evaluation(r.record) == "judge_check"]
        self.bare = [r for r in loaded.runs if r.record.task == "infer" and _is_bare(r.record)]
        texts = [r for r in finished if facts.evaluation(r.record) == "text"]
        # With passages in its prompt a model is neither the untouched one nor the trained one.
        self.tested = [r for r in texts if facts.at(r.record.config, "text", "context") in (None, "none")]
        self.trained = Trained(loaded)

    def inference(self, run: Run) -> dict[str, Cell] | None:
        record = run.record
        if record.task != "infer":
            return None
        cells = self._who(run)
        cells["dtype"] = text(facts.name_at(record.config, "dtype"))
        kernel = facts.kernel(record)
        cells["kernel"] = text(kernel) if kernel else Cell((unknown("the record names no kernel"),))
        cells["batch_size"] = Cell((entries.batch_size(run),))
        for key, scaled in (
            ("energy_scaled_40k", published.scaled_energy(record)),
            ("time_scaled_40k", published.scaled_time(record)),
        ):
            entry = by_key(INFERENCE, key).entry(scaled, run.path, missing=entries.unmeasured(record))
            cells[key] = Cell((entry,))
        for column in INFERENCE:
            if column.key not in cells and column.kind == "number":
                cells[column.key] = Cell((entries.measured(column, run),))
        for key, names, missing in (
            ("judge_score", entries.SCORES, _UNJUDGED),
            ("win_rate", ("win_rate",), _UNCOMPARED),
        ):
            cells[key] = self._judged(by_key(INFERENCE, key), names, run, missing)
        cells["human_grade"] = self._graded(by_key(INFERENCE, "human_grade"), run)
        return cells

    def finetuning(self, run: Run) -> dict[str, Cell] | None:
        record = run.record
        if record.task != "train":
            return None
        cells = self._who(run)
        cells["steps"] = Cell((entries.steps(run),))
        scored = [r for r in self.tested if facts.subject_hash(r.record) == (record.config_hash or None)]
        # Scores on other data, or on a base of other bits, are nothing to set against the one before.
        after = _preferred(r for r in scored if _kin(r.record, record))
        before, missing = self._before(record, after)
        for column in FINETUNING:
            if column.kind == "pair":
                first = entries.scored(column, before, missing, "before")
                untested = _UNTESTED if record.status == "ok" else entries.unmeasured(record)
                cells[column.key] = Cell((first, entries.scored(column, after, untested, "after")))
            elif column.key not in cells:
                cells[column.key] = Cell((entries.measured(column, run),))
        return cells

    def quantization(self, run: Run) -> dict[str, Cell] | None:
        record = run.record
        if record.task != "evaluate" or facts.evaluation(record) != "fidelity":
            return None
        ran = self._inference_of(record)
        cells = self._who(run)
        cells["dtype"] = text(facts.name_at(record.config, "dtype"))
        # Fidelity may be measured on another kernel than the one that the speed is of.
        kernel = facts.kernel((ran or run).record)
        cells["kernel"] = text(kernel) if kernel else Cell((unknown("the record names no kernel"),))
        for column in QUANTIZATION:
            if column.key not in cells:
                cells[column.key] = Cell((entries.cost_or_loss(column, run, ran),))
        return cells

    def _inference_of(self, record: Record) -> Run | None:
        """The run whose cost is that of the model measured: a finished one first, then small batches, then newest."""
        alike = [run for run in self.bare if _same_model(run.record) == _same_model(record)]
        finished = [run for run in alike if run.record.status == "ok"]

        def order(run: Run) -> tuple[float, float]:
            size = facts.at(run.record.config, "engine", "batch_size")
            return (size if isinstance(size, int) else 1, -run.when.timestamp())

        return min(finished or alike, key=order, default=None)

    def evaluation(self, run: Run) -> dict[str, Cell] | None:
        record = run.record
        if record.task != "evaluate":
            return None
        kind = facts.evaluation(record)
        by_judge = kind in ("judge", "judge_check")
        cells = self._who(run)
        cells["evaluation"] = text(kind, run.path)
        # A judge reads the questions that the judged run was asked.
        on = facts.name_at(facts.about(record), "questions" if kind == "judge" else "data", "name")
        if facts.at(record.config, "questions"):
            on = facts.name_at(record.config, "questions", "name")
        cells["on"] = text("held-out texts" if kind == "fidelity" else on)
        figures = tuple(
            entries.figure(name, record.quality[name], run) for name in entries.headlines(kind, record.quality)
        )
        cells["figures"] = Cell(figures or (unknown(entries.unmeasured(record)),))
        for key in ("judgments", "judgments_missing"):
            why = NO_READING if by_judge else _NO_JUDGE
            cells[key] = Cell((entries.count(record, key, run.path, why),))
        tested = self._test_of(record) if by_judge else None
        for column in JUDGE_TESTED:
            missing = _NO_TEST if by_judge else _NO_JUDGE
            cells[column.key] = Cell((entries.scored(column, tested, missing, ""),))
        return cells

    def _test_of(self, record: Record) -> Run | None:
        """The newest test of the judge that a record is of."""
        alike = [run for run in self.checks if _same_judge(run.record, record)]
        return max(alike, key=lambda run: run.when, default=None)

    def unfinished(self, run: Run) -> dict[str, Cell] | None:
        record = run.record
        if record.status == "ok":
            return None
        cells = self._who(run)
        task = f"evaluate {facts.evaluation(record)}" if record.task == "evaluate" else record.task
        cells["task"] = text(task)
        cells["status"] = text(record.status.replace("_", " "))
        line = facts.error_line(record)
        cells["error"] = text(line) if line else Cell((unknown("the record holds no error message"),))
        cells["folder"] = text(run.path.parent, run.path)
        return cells

    def _who(self, run: Run) -> dict[str, Cell]:
        return {
            "model": text(facts.model(run.record), run.path),
            "quant": text(", ".join(facts.quant_words(run.record))),
            "adapter": text(self.trained.adapter(run.record.task, run.record.config, run.record.subject)),
            "device": text(facts.device(run.record)),
        }

    def _judged(self, column: Column, names: Iterable[str], run: Run, missing: str) -> Cell:
        scores = []
        for judge in self.judged:
            if run.record.config_hash and facts.subject_hash(judge.record) == run.record.config_hash:
                reading = next((judge.record.quality[name] for name in names if name in judge.record.quality), None)
                if reading:
                    missing_too = judge.record.counts.get("judgments_missing")
                    label = facts.clean(reading.method) + (f", {missing_too} missing" if missing_too else "")
                    scores.append(column.entry(reading, judge.path, label))
        if facts.has_random_weights(run.record) and not scores:
            missing = "a model with random weights has no quality to score"
        return Cell(tuple(scores) or (unknown(missing),))

    def _graded(self, column: Column, run: Run) -> Cell:
        grades = []
        for study in self.studies:
            for model in facts.at(study.record.config, "models") or ():
                reading = study.record.quality.get(grade_name(str(facts.at(model, "label"))))
                if reading and run.record.config_hash and facts.at(model, "config_hash") == run.record.config_hash:
                    grades.append(column.entry(reading, study.path, facts.clean(study.path.parent.name)))
        return Cell(tuple(grades) or (unknown(_UNGRADED),))

    def _before(self, trained: Record, after: Run | None) -> tuple[Run | None, str]:
        def same(record: Record) -> bool:
            return _is_bare(record) and _kin(record, trained)

        bare = [run for run in self.tested if same(run.record)]
        if not after:
            return _preferred(bare), _NO_BASE
        # Scores over the first few questions and over all of them are not a before and an after.
        limit = facts.at(after.record.config, "limit")
        alike = [run for run in bare if facts.at(run.record.config, "limit") == limit]
        other = "before: the untouched model was scored with another limit= than the trained one"
        return _preferred(alike), other if bare else _NO_BASE


def _same_judge(record: Record, other: Record) -> bool:
    keys = ("model", "base_url", "temperature", "max_tokens", "rating", "grammar", "templates", "extra_body")
    return all(facts.at(record.config, "judge", key) == facts.at(other.config, "judge", key) for key in keys)


def _kin(record: Record, other: Record) -> bool:
    # The same model, quantization and data.
    data = [facts.name_at(one.config, "data", "name") for one in (record, other)]
    quants = [facts.quant_words(one) for one in (record, other)]
    return data[0] == data[1] and facts.model(record) == facts.model(other) and quants[0] == quants[1]


def _is_bare(record: Record) -> bool:
    return not record.subject and not facts.at(record.config, "adapter_path")


def _same_model(record: Record) -> tuple[object, ...]:
    # The whole groups: a name is shared by quantizations of other bits, and by models with and without weights.
    groups = [facts.at(record.config, key) for key in ("model", "quant", "dtype")]
    return (*groups, facts.pruning(record), facts.device(record))


def _by_divergence(row: Row) -> tuple[str, float]:
    # Divergences of two models are nothing to rank by.
    divergence = row.cells["kl_divergence_mean"].sort_value
    known = divergence if isinstance(divergence, float) else math.inf
    return str(row.cells["model"].sort_value), known


def _preferred(runs: Iterable[Run]) -> Run | None:
    # The newest, and one over the whole set before one cut short by limit=.
    found = sorted(runs, key=lambda run: (facts.at(run.record.config, "limit") is None, run.when))
    return found[-1] if found else None


def marks_of(record: Record, table: str) -> tuple[str, ...]:
    """What qualifies a whole row of this record in the table of this key."""
    marks = [RANDOM] if facts.has_random_weights(record) else []
    marks += [EMULATED] if facts.emulated(record) else []
    marks += _fidelity_marks(record) if table == "quantization" else []
    # The table of unfinished runs has a column for it.
    marks += [record.status.replace("_", " ")] if record.status != "ok" and table != "unfinished" else []
    return tuple(marks)


def _fidelity_marks(record: Record) -> list[str]:
    divergence = record.quality.get("kl_divergence_mean")
    said = {
        DEQUANTIZED: divergence is not None and "dequantized_weights" in divergence.method,
        SHORT: facts.at(record.config, "limit") is not None,
        REDRAWN: facts.at(record.config, "fidelity", "answers_seed") not in (None, 0),
    }
    return [mark for mark, holds in said.items() if holds]
