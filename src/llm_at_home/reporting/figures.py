"""Geometry of the bar charts: ``bars.svg.jinja`` draws in per cent, so text stays readable on a phone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from llm_at_home.reporting import facts
from llm_at_home.reporting.cells import Cell, Column, Row, Table
from llm_at_home.reporting.figuredata import Data, interval

_LABEL_LENGTH = 48  # what a phone can hold
_BETWEEN = " · "
_LEAST_WORD = 12  # characters of a word that is cut
_MOST_BARS = 32
# The rest of the width holds the value at the bar's end.
_FULL_BAR = 80.0
_CHARTS = {
    "inference": ("torch_allocated_peak", "resident_set_peak", "decode_tokens_per_second"),
    "finetuning": ("torch_allocated_peak", "resident_set_peak", "steps_per_second"),
}


@dataclass(frozen=True)
class Bar:
    """One bar: widths and the whisker's ends in per cent of the chart's width."""

    label: str
    text: str
    width: float
    whisker: tuple[float, float] | None
    marked: bool

    @property
    def end(self) -> float:
        """Where the value's text starts."""
        return max(self.width, self.whisker[1]) if self.whisker else self.width


@dataclass(frozen=True)
class Chart:
    """A horizontal bar chart; ``description`` tells its figures to those who cannot see it."""

    key: str
    title: str
    note: str
    description: str
    bars: tuple[Bar, ...]
    data: Data
    kind: ClassVar[str] = "bars"
    wide: ClassVar[bool] = False


def charts(table: Table) -> tuple[Chart, ...]:
    """The charts that belong to a table; none for a figure that fewer than two rows know."""
    shown = {column.key: column for column in table.columns}
    drawn = [_chart(table, shown[key]) for key in _CHARTS.get(table.key, ()) if key in shown]
    return tuple(chart for chart in drawn if chart)


def _chart(table: Table, column: Column) -> Chart | None:
    known = [(row, value) for row in table.rows if isinstance(value := row.cells[column.key].sort_value, float)]
    if len(known) < 2:
        return None
    known.sort(key=lambda pair: pair[1], reverse=column.better == "higher")
    left_out, known = known[_MOST_BARS:], known[:_MOST_BARS]
    names = labels([row for row, _ in known])
    entries = [row.cells[column.key].entries[0] for row, _ in known]
    top = max(
        max(value, *(entry.bounds or ())) if entry.bounds else value
        for (_, value), entry in zip(known, entries, strict=True)
    )
    scale = _FULL_BAR / top if top > 0 else 0.0
    bars = tuple(
        Bar(
            label,
            entry.text,
            round(max(value, 0) * scale, 2),
            tuple(round(max(end, 0) * scale, 2) for end in entry.bounds) if entry.bounds else None,  # type: ignore
            bool(row.marks),
        )
        for (row, value), label, entry in zip(known, shortened(names, _LABEL_LENGTH), entries, strict=True)
    )
    notes = ["Less is better." if column.better == "lower" else "More is better."]
    notes += ["Whiskers: 95 % interval."] if any(bar.whisker for bar in bars) else []
    notes += ["Muted bars: see the marks in the table."] if any(bar.marked for bar in bars) else []
    notes += [f"The first {_MOST_BARS} of {_MOST_BARS + len(left_out)} runs."] if left_out else []
    told = "; ".join(
        f"{name}: {entry.text}" + (f" ({entry.interval})" if entry.interval else "")
        for name, entry in zip(names, entries, strict=True)
    )
    data = Data(
        ("run", column.full_title, "95 % low", "95 % high", "marks"),
        tuple(
            (label, value, *interval(entry), ", ".join(row.marks))
            for label, (row, value), entry in zip(names, known, entries, strict=True)
        ),
        tuple(row.source for row, _ in known),
    )
    return Chart(f"{table.key}-{column.key}", column.full_title, " ".join(notes), told, bars, data)


def labels(rows: Sequence[Row]) -> list[str]:
    """A name for each run that no other has: its quantization, and what else tells it from the others."""

    def parts(row: Row, keys: Sequence[str]) -> str:
        words = [cell.entries[0].text for key in keys if (cell := row.cells.get(key)) and not _says_none(key, cell)]
        return _BETWEEN.join(words)

    # What all runs share would only make every label longer.
    many = [key for key in ("model", "adapter") if len({parts(row, [key]) for row in rows}) > 1]
    keys: list[str] = [key for key in ("model", "quant", "adapter") if key == "quant" or key in many]
    keys += ["dtype"] if len({parts(row, keys) for row in rows}) < len(rows) else []
    devices = [parts(row, ["device"]) for row in rows]
    # Last, since it is what a phone can best do without.
    ends = [f"{_BETWEEN}{device}" if len(set(devices)) > 1 else "" for device in devices]
    return told_apart([parts(row, keys) for row in rows], rows, ends)


def told_apart(names: Sequence[str], rows: Sequence[Row], ends: Sequence[str]) -> list[str]:
    """The names with their ends; between them batch size, engine and seed where those tell one from another."""
    named = list(names)
    for more in (_batch, _engine, _seed):
        words: dict[tuple[str, str], set[str]] = {}
        for name, end, row in zip(named, ends, rows, strict=True):
            words.setdefault((name, end), set()).add(more(row))
        named = [
            f"{name}{_BETWEEN}{more(row)}" if len(words[name, end]) > 1 and more(row) else name
            for name, end, row in zip(named, ends, rows, strict=True)
        ]
    seen: Counter[tuple[str, str]] = Counter()
    whole = []
    for name, end in zip(named, ends, strict=True):
        seen[name, end] += 1
        times = seen[name, end]
        whole.append(f"{name}{end}" if times == 1 else f"{name} ({times}){end}")
    return whole


def _says_none(key: str, cell: Cell) -> bool:
    # "none" alone is a base that is not quantized.
    return key == "adapter" and cell.entries[0].text == "none"


def _batch(row: Row) -> str:
    entry = row.cells["batch_size"].entries[0] if "batch_size" in row.cells else None
    return f"batch {entry.text}" if entry and entry.value is not None else ""


def _engine(row: Row) -> str:
    name = facts.name_at(row.run.record.config, "engine", "name") if row.run else facts.UNKNOWN
    return "" if name == facts.UNKNOWN else name


def _seed(row: Row) -> str:
    seed = facts.at(facts.about(row.run.record), "seed") if row.run else None
    return "" if seed is None else f"seed {facts.clean(seed)}"


def shortened(labels: Sequence[str], length: int) -> list[str]:
    """Labels of at most ``length`` characters: long words are cut first, and the end where that is not enough."""
    short = [_shortened(label, length) for label in labels]
    # Where two would then be one, each has its number.
    twice = {label for label, times in Counter(short).items() if times > 1}
    return [
        f"{i + 1}. {_shortened(whole, length - len(f'{i + 1}. '))}" if label in twice else label
        for i, (whole, label) in enumerate(zip(labels, short, strict=True))
    ]


def _shortened(label: str, length: int) -> str:
    words = label.split(_BETWEEN)
    while len(_BETWEEN.join(words)) > length:
        longest = max(range(len(words)), key=lambda i: len(words[i]))
        if len(words[longest]) <= _LEAST_WORD:
            return f"{_BETWEEN.join(words)[: length - 1]}…"
        words[longest] = f"{words[longest].removesuffix('…')[:-1]}…"
    return _BETWEEN.join(words)
