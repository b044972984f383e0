"""The paper's Tables I and III: what each method took here beside what was published."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llm_at_home.records.schema import Reading, Record
from llm_at_home.reporting import entries, facts, published
from llm_at_home.reporting.cells import Cell, Column, Entry, Row, Table, number, text, unknown
from llm_at_home.reporting.load import Loaded, Run
from llm_at_home.reporting.tables import MARK_NOTES, marks_of

#: The architecture of the paper's models, by the names of conf/model.
ARCHITECTURE = ("llama2_7b", "llama2_7b_chat")
_UNPUBLISHED = "not published"
_OOM = "OOM"
_OUT_OF_MEMORY = "published as out of memory"
_NOT_IN_PAPER = "the paper has no such row"
_CPU = "a CPU has no memory of a card; its resident set is in the table of all runs"
#: The paper's micro-batch, accumulation and longest sequence.
_FINETUNING = (1, 8, 400)

_WHO = (
    Column("method", "Method", kind="text"),
    Column("model", "Model", kind="text"),
    Column("device", "Device", kind="text"),
    Column("protocol", "Protocol", kind="text"),
)
_MEMORY = (
    Column("memory", "ours", "Memory", unit="GB", better="lower"),
    Column("memory_published", "published, A100", "Memory", unit="GB"),
)
_ENERGY = (
    Column("energy", "ours, scaled", "Energy", unit="Wh", decimals=1, better="lower"),
    Column("energy_published", "published, A100", "Energy", unit="Wh", decimals=1),
    Column("energy_t4_published", "published, T4", "Energy", unit="Wh", decimals=1),
)


def _speed(unit: str, decimals: int) -> tuple[Column, ...]:
    return (
        Column("speed", "ours", "Speed", unit=unit, decimals=decimals, better="higher"),
        Column("speed_published", "published, A100", "Speed", unit=unit, decimals=decimals),
        Column("speed_t4_published", "published, T4", "Speed", unit=unit, decimals=decimals),
    )


@dataclass(frozen=True)
class _Kind:
    """One of the two tables: which figures of ours and of the paper it holds."""

    key: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    speed: str
    published_speed: str
    rows: Sequence[dict[str, Any]]
    counterpart: Callable[[Record], dict[str, Any] | None]
    energy: Callable[[Record], Reading | None]
    protocol: Callable[[Record], str]
    label: Callable[[Record], str]
    command: Callable[[dict[str, Any]], str]


def tables(loaded: Loaded) -> tuple[Table, Table]:
    """Tables I and III: the paper's rows with each of our runs of them, then what the project has beyond."""
    one, three = published.table1(), published.table3()
    inference = _Kind(
        "table-1",
        "Table I: inference",
        f"Published: {one['workload']}, on {one['device']} and T4. Ours: what each row says, one conversation at a "
        f"time. Our memory is that of the process on the card. Energy is scaled to {one['generated_tokens']:,} tokens, "
        "which the published energies imply, from our J/token. No row is the paper's own setting where model, device "
        "or protocol differ: compare within a column, and between columns only in order. "
        "Cards of one name stand in hosts of different speed.",
        (*_WHO, *_MEMORY, *_speed("tokens/s", 2), *_ENERGY),
        "output_tokens_per_second",
        "tokens_per_second",
        one["rows"],
        published.counterpart,
        published.scaled_energy,
        _answering,
        lambda record: ", ".join(facts.quant_words(record)),
        lambda row: f"python infer.py quant={row['quant']}",
    )
    finetuning = _Kind(
        "table-3",
        "Table III: fine-tuning",
        f"Published: {three['workload']}, on {three['device']} and T4. Ours: a few steps of the same split (one "
        f"sequence at a time, eight to a step, up to 400 tokens); energy is extrapolated from our J/step to "
        f"{three['steps']:,} steps. Runs with another split are in the table of all runs. Our memory is that of the "
        "process on the card.",
        (*_WHO, *_MEMORY, *_speed("steps/s", 3), *_ENERGY),
        "steps_per_second",
        "steps_per_second",
        three["rows"],
        published.finetuning_counterpart,
        published.scaled_training_energy,
        _training,
        _adapter,
        lambda row: f"python train.py adapter={row['adapter']} quant={row['quant']}",
    )
    return _table(inference, _inference(loaded)), _table(finetuning, _finetuning(loaded))


def of_the_paper(table: Table) -> list[Row]:
    """The rows of the paper's architecture, and those that nobody ran."""
    return [row for row in table.rows if row.run is None or facts.model(row.run.record) in ARCHITECTURE]


def _table(kind: _Kind, runs: Sequence[Run]) -> Table:
    rows = []
    matched: set[int] = set()
    for printed in kind.rows:
        ours = [run for run in runs if kind.counterpart(run.record) is printed]
        matched |= {id(run) for run in ours}
        for run in sorted(ours, key=_order):
            rows.append(_row(kind, run, printed))
        if not ours:
            rows.append(_row(kind, None, printed))
    beyond = [run for run in runs if id(run) not in matched and facts.model(run.record) in ARCHITECTURE]
    rows += [_row(kind, run, None) for run in sorted(beyond, key=_order)]
    return Table(kind.key, kind.title, kind.caption, kind.columns, tuple(rows), MARK_NOTES)


def _row(kind: _Kind, run: Run | None, printed: dict[str, Any] | None) -> Row:
    name = printed["name"] if printed else ""
    if run is None:
        why = f"no run of this yet: {kind.command(printed or {})}"
        cells = {key: Cell((unknown(why),)) for key in ("model", "device", "protocol", "memory", "speed", "energy")}
        cells["method"] = text(name, published.SOURCE)
    else:
        record = run.record
        label = kind.label(record)
        cells = {
            "method": text(f"{name} ({label})" if name and name != label else name or label, run.path),
            "model": text(_model(record)),
            "device": text(facts.device(record)),
            "protocol": text(kind.protocol(record)),
            "memory": Cell((_memory(kind, run),)),
            "speed": Cell((_entry(kind, "speed", record.readings.get(kind.speed), run),)),
            "energy": Cell((_entry(kind, "energy", kind.energy(record), run),)),
        }
    t4 = (printed or {}).get("t4", {})
    for key, value in (
        ("memory_published", (printed or {}).get("vram_gb")),
        ("speed_published", (printed or {}).get(kind.published_speed)),
        ("speed_t4_published", t4.get(kind.published_speed)),
        ("energy_published", (printed or {}).get("energy_wh")),
        ("energy_t4_published", t4.get("energy_wh")),
    ):
        cells[key] = Cell((_printed(kind, key, value, printed),))
    marks = marks_of(run.record, kind.key) if run else ()
    return Row(cells, run.path if run else published.SOURCE, marks, run)


def _printed(kind: _Kind, key: str, value: Any, row: dict[str, Any] | None) -> Entry:
    if value is None:
        return unknown(_UNPUBLISHED if row else _NOT_IN_PAPER)
    if value == published.OUT_OF_MEMORY:
        return Entry(_OOM, reason=_OUT_OF_MEMORY)
    column = next(column for column in kind.columns if column.key == key)
    return Entry(number(value, column.decimals), float(value), detail="as published", source=published.SOURCE)


def _entry(kind: _Kind, key: str, reading: Reading | None, run: Run) -> Entry:
    column = next(column for column in kind.columns if column.key == key)
    return column.entry(reading, run.path, missing=entries.unmeasured(run.record))


def _memory(kind: _Kind, run: Run) -> Entry:
    if facts.on_cpu(run.record):
        return unknown(_CPU)
    if run.record.status == "out_of_memory":
        return Entry(_OOM, reason="it ran out of memory: see the record")
    return _entry(kind, "memory", run.record.readings.get("process_memory_peak"), run)


def _model(record: Record) -> str:
    random = ", random weights" if facts.has_random_weights(record) else ""
    return f"{facts.model(record)}, {facts.name_at(record.config, 'dtype')}{random}"


def _answering(record: Record) -> str:
    questions, engine = facts.at(record.config, "questions"), facts.at(record.config, "engine")
    prompts = facts.at(questions, "prompt_tokens")
    said = [f"{prompts} random tokens" if prompts else facts.name_at(questions, "name")]
    said += [f"up to {facts.name_at(engine, 'max_new_tokens')} new"]
    # The paper's was transformers' generate, which is this engine.
    said += [f"engine {name}" for name in [facts.name_at(engine, "name")] if name != "eager"]
    made = record.counts.get("generated_tokens")
    return ", ".join([*said, *([f"{made:,} made"] if isinstance(made, int) else [])])


def _training(record: Record) -> str:
    data, steps = facts.at(record.config, "data"), record.counts.get("optimizer_steps")
    said = ["random tokens" if facts.name_at(data, "source") == "synthetic" else facts.name_at(data, "name")]
    said += [f"{steps} steps"] if isinstance(steps, int) else []
    rank = facts.at(record.config, "adapter", "r")
    return ", ".join([*said, *([f"rank {rank}"] if rank else [])])


def _adapter(record: Record) -> str:
    peft = facts.at(record.config, "adapter", "implementation") == "peft"
    words = [facts.name_at(record.config, "adapter", "name") + (" of PEFT" if peft else ""), *facts.quant_words(record)]
    return ", ".join(words)


def _inference(loaded: Loaded) -> list[Run]:
    def alone(run: Run) -> bool:
        config = run.record.config
        bare = not run.record.subject and not facts.at(config, "adapter_path") and not facts.pruning(run.record)
        return run.record.task == "infer" and bare and facts.at(config, "engine", "batch_size") == 1

    return _newest(run for run in loaded.runs if alone(run))


def _finetuning(loaded: Loaded) -> list[Run]:
    def split(run: Run) -> bool:
        config = run.record.config
        found = (
            facts.at(config, "data", "batch_size"),
            facts.at(config, "callbacks", "accumulation", "steps"),
            facts.at(config, "data", "max_length"),
        )
        return run.record.task == "train" and found == _FINETUNING and not facts.pruning(run.record)

    return _newest(run for run in loaded.runs if split(run))


def _newest(runs: Iterable[Run]) -> list[Run]:
    """One run of each method, model and device: one with a speed first, then of the most tokens, then the newest."""
    best: dict[tuple[object, ...], Run] = {}

    def rank(run: Run) -> tuple[bool, bool, int, float]:
        made, readings = run.record.counts.get("generated_tokens", 0), run.record.readings
        told = "output_tokens_per_second" in readings or "steps_per_second" in readings
        return run.record.status == "ok", told, made if isinstance(made, int) else 0, run.when.timestamp()

    for run in runs:
        record = run.record
        key = (
            facts.model(record),
            facts.has_random_weights(record),
            facts.quant_words(record),
            facts.name_at(record.config, "dtype"),
            facts.device(record),
            facts.name_at(record.config, "engine", "name"),
            _adapter(record),
        )
        if key not in best or rank(run) > rank(best[key]):
            best[key] = run
    return list(best.values())


def _order(run: Run) -> tuple[bool, bool, str, str]:
    record = run.record
    names = (", ".join(facts.quant_words(record)), facts.device(record))
    return facts.model(record) not in ARCHITECTURE, facts.emulated(record) is not None, *names
