"""Quality over size and cost: what each quantization loses against its bits, its memory and its energy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path

from llm_at_home.reporting import facts
from llm_at_home.reporting.cells import Entry, Row, Table
from llm_at_home.reporting.figuredata import Data, interval
from llm_at_home.reporting.pareto import front, steps
from llm_at_home.reporting.plot import Dot, Plot, lay_out

_BITS, _DIVERGENCE, _ENERGY = "bits_per_weight", "kl_divergence_mean", "energy_per_token"
_MEMORY = ("torch_allocated_peak", "resident_set_peak")
_BIT_TICKS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64)
_LOST = "mean KL divergence, nats/token"
_TITLES = {
    _BITS: ("bits per weight", "bits"),
    _MEMORY[0]: ("peak of tensors in the card's memory, GB", "GB"),
    _MEMORY[1]: ("peak resident set of the process, GB", "GB"),
    _ENERGY: ("energy of a generated token, J", "J/token"),
}


def plots(table: Table) -> tuple[Plot, ...]:
    """KL divergence over bits per weight, a plot for each model and device; none where fewer than two are known."""
    if table.key != "quantization":
        return ()

    def place(row: Row) -> tuple[str, ...]:
        return tuple(row.cells[key].entries[0].text for key in ("model", "device"))

    return _made(table, f"{table.key}-", _BITS, "KL divergence over bits per weight", place, False)


def fronts(table: Table, folders: dict[Path, str]) -> tuple[Plot, ...]:
    """KL divergence over the measured peak of memory and over energy, with the front of those that nothing beats.

    A plot for each model and machine, never of two: ``folders`` has the machine of each record by its path, and a
    figure belongs to the machine of the record that holds it.
    """
    made: list[Plot] = []
    for key, what in ((_MEMORY[0], "memory"), (_MEMORY[1], "memory"), (_ENERGY, "energy")):
        if key not in (column.key for column in table.columns):
            continue

        def place(row: Row, key: str = key) -> tuple[str, ...]:
            source = row.cells[key].entries[0].source
            return row.cells["model"].entries[0].text, folders.get(source, "") if source else ""

        known = [row for row in table.rows if _value(row, key) > 0]
        part = Table(table.key, table.title, table.caption, table.columns, tuple(known), table.mark_notes)
        made += _made(part, f"front-{key}-".replace("_", "-"), key, f"Quality against {what}", place, True)
    return tuple(made)


def _made(
    table: Table, key: str, x: str, title: str, place: Callable[[Row], tuple[str, ...]], pareto: bool
) -> tuple[Plot, ...]:
    places = [(where, list(rows)) for where, rows in groupby(sorted(table.rows, key=place), place)]
    made = [
        _plot(f"{key}{i}", f"{title}: {', '.join(where)}", rows, x, pareto) for i, (where, rows) in enumerate(places)
    ]
    return tuple(plot for plot in made if plot)


def _plot(key: str, title: str, rows: Sequence[Row], x: str, pareto: bool) -> Plot | None:
    rows = _newest(rows)
    labelled = list(zip(_labels(rows), rows, strict=True))
    known = [(label, row) for label, row in labelled if _value(row, x) > 0 and _value(row, _DIVERGENCE) > 0]
    if len(known) < 2:
        return None
    dots = [
        Dot(
            label,
            f"{label}: {_told(row, x)}",
            _value(row, x),
            _value(row, _DIVERGENCE),
            _ends(row.cells[_DIVERGENCE].entries[0]),
            bool(row.marks),
        )
        for label, row in known
    ]
    # What a mark qualifies is not what the others are, and beats none of them.
    best = front([(dot.x, dot.y) for dot in dots if not dot.marked]) if pareto else []
    shown = [row for _, row in known]
    notes = ["Lower is closer to the unquantized model, further left is smaller. Both axes are logarithmic."]
    notes += ["The dashed line joins those that no other beats in both."] if len(best) > 1 else []
    notes += [f"{_names(dots, best)} beats all others in both." for _ in [0] if len(best) == 1]
    notes += ["Whiskers: 95 % interval."] if any(dot.ends[0] != dot.ends[1] for dot in dots) else []
    notes += ["Muted points: see the marks in the table."] if any(dot.marked for dot in dots) else []
    missing = [f"{label} ({_absence(row, x)})" for label, row in labelled if row not in shown]
    notes += [f"Not drawn: {'; '.join(missing)}."] if missing else []
    header = ("quantization", _TITLES[x][0], _LOST, "95 % low", "95 % high", "marks")
    data = Data(
        (*header, "on the front") if pareto else header,
        tuple(
            (
                label,
                _value(row, x),
                _value(row, _DIVERGENCE),
                *interval(row.cells[_DIVERGENCE].entries[0]),
                ", ".join(row.marks),
                *((_on(dot, best),) if pareto else ()),
            )
            for (label, row), dot in zip(known, dots, strict=True)
        ),
        tuple(row.source for row in shown),
    )
    return lay_out(
        key,
        title,
        " ".join(notes),
        (_TITLES[x][0], _LOST),
        dots,
        data,
        x_ticks=_BIT_TICKS if x == _BITS else None,
        line=steps(best),
    )


def _names(dots: Sequence[Dot], best: Sequence[tuple[float, float]]) -> str:
    return " and ".join(dot.label for dot in dots if _on(dot, best) == "yes")


def _on(dot: Dot, best: Sequence[tuple[float, float]]) -> str:
    return "yes" if not dot.marked and (dot.x, dot.y) in best else "no"


def _newest(rows: Iterable[Row]) -> list[Row]:
    # One quantization may have been measured by more than one version of the code, or with other settings.
    rows = [row for row in rows if row.run]
    rows.sort(key=lambda row: row.run.when.timestamp() if row.run else 0.0)
    return list({(row.cells["quant"], row.cells["dtype"].sort_value, row.marks): row for row in rows}.values())


def _labels(rows: Sequence[Row]) -> list[str]:
    said = [facts.quant_words(row.run.record) if row.run else ("",) for row in rows]
    # What all of a method share would only make each label longer.
    shared = {
        name: set.intersection(*(set(words) for words in said if words[0] == name))
        for name in {words[0] for words in said}
    }
    short = [[words[0], *(word for word in words[1:] if word not in shared[words[0]])] for words in said]
    _append(short, [row.cells["dtype"].entries[0].text for row in rows], always=["none"])
    _append(short, [", ".join(row.marks) for row in rows])
    return [", ".join(words) for words in short]


def _append(labels: Sequence[list[str]], extras: Sequence[str], always: list[str] | None = None) -> None:
    """Add to each label its extra word where that tells it from another, and to the label ``always`` in any case."""
    others: dict[tuple[str, ...], set[str]] = {}
    for label, extra in zip(labels, extras, strict=True):
        others.setdefault(tuple(label), set()).add(extra)
    for label, extra in zip(labels, extras, strict=True):
        if extra and (label == always or len(others[tuple(label)]) > 1):
            label.append(extra)


def _value(row: Row, key: str) -> float:
    value = row.cells[key].sort_value
    return value if isinstance(value, float) else 0.0


def _ends(entry: Entry) -> tuple[float, float]:
    value = entry.value if isinstance(entry.value, float) else 0.0
    return entry.bounds or (value, value)


def _told(row: Row, x: str) -> str:
    size, divergence = (row.cells[key].entries[0] for key in (x, _DIVERGENCE))
    interval = f" ({divergence.interval})" if divergence.interval else ""
    return f"{size.text} {_TITLES[x][1]}, {divergence.text}{interval} nats/token"


def _absence(row: Row, x: str) -> str:
    if row.cells[_DIVERGENCE].sort_value == 0:
        return "no divergence" if x == _BITS else f"no divergence, at {row.cells[x].entries[0].text} {_TITLES[x][1]}"
    return "unknown"
