"""Geometry of the plot of quality over size: ``scatter.svg.jinja`` draws it in units of one CSS pixel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from llm_at_home.reporting import facts
from llm_at_home.reporting.cells import Entry, Row, Table

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 880.0, 64.0, 590.0, 8.0, 44.0
_LABELS = 630.0  # where the column of labels starts, beside the points, which lie too close to hold their own
_LINE = 16.0  # of a label
_LEAST_HEIGHT = 320.0
_LABEL_LENGTH = 38
_BITS, _DIVERGENCE = "bits_per_weight", "kl_divergence_mean"
_BIT_TICKS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64)


@dataclass(frozen=True)
class Tick:
    """A value that an axis names, and where."""

    text: str
    at: float


@dataclass(frozen=True)
class Point:
    """One quantization: its place, the ends of its interval (``high`` above ``low``) and its label's line."""

    label: str
    told: str
    x: float
    y: float
    low: float
    high: float
    label_y: float
    marked: bool


@dataclass(frozen=True)
class Plot:
    """A scatter plot; ``description`` tells its figures to those who cannot see it."""

    key: str
    title: str
    note: str
    description: str
    height: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    points: tuple[Point, ...]
    width: float = _WIDTH
    left: float = _LEFT
    right: float = _RIGHT
    top: float = _TOP
    labels: float = _LABELS

    @property
    def bottom(self) -> float:
        """The height at which the horizontal axis lies."""
        return self.height - _BOTTOM


def plots(table: Table) -> tuple[Plot, ...]:
    """KL divergence over bits per weight, a plot for each model and device; none where fewer than two are known."""
    if table.key != "quantization":
        return ()

    def place(row: Row) -> tuple[str, ...]:
        return tuple(row.cells[key].entries[0].text for key in ("model", "device"))

    places = [(where, list(rows)) for where, rows in groupby(sorted(table.rows, key=place), place)]
    made = [_plot(f"{table.key}-{i}", where, rows) for i, (where, rows) in enumerate(places)]
    return tuple(plot for plot in made if plot)


def _plot(key: str, where: Sequence[str], rows: Sequence[Row]) -> Plot | None:
    rows = _newest(rows)
    labelled = list(zip(_labels(rows), rows, strict=True))
    known = [(label, row) for label, row in labelled if _value(row, _BITS) > 0 and _value(row, _DIVERGENCE) > 0]
    if len(known) < 2:
        return None
    known.sort(key=lambda pair: _value(pair[1], _DIVERGENCE), reverse=True)
    shown = [row for _, row in known]
    height = _TOP + max(_LEAST_HEIGHT, _LINE * len(known)) + _BOTTOM
    bits = [_value(row, _BITS) for row in shown]
    ends = [_ends(row.cells[_DIVERGENCE].entries[0]) for row in shown]
    x = _logarithmic(bits, _LEFT, _RIGHT)
    divergences = [_value(row, _DIVERGENCE) for row in shown]
    y = _logarithmic([*divergences, *(end for pair in ends for end in pair if end > 0)], height - _BOTTOM, _TOP)
    places = [y(divergence) for divergence in divergences]
    lines = _spread(places, _LINE, _TOP + _LINE / 2, height - _BOTTOM)
    points = tuple(
        Point(
            label if len(label) <= _LABEL_LENGTH else f"{label[: _LABEL_LENGTH - 1]}…",
            f"{label}: {_told(row)}",
            round(x(size), 1),
            round(place, 1),
            round(y(low), 1) if low > 0 else height - _BOTTOM,
            round(y(high), 1),
            round(line, 1),
            bool(row.marks),
        )
        for (label, row), size, place, (low, high), line in zip(known, bits, places, ends, lines, strict=True)
    )
    notes = ["Lower is closer to the unquantized model, further left is smaller. Both axes are logarithmic."]
    notes += ["Whiskers: 95 % interval."] if any(low != high for low, high in ends) else []
    notes += ["Muted points: see the marks in the table."] if any(point.marked for point in points) else []
    missing = [f"{label} ({_absence(row)})" for label, row in labelled if row not in shown]
    notes += [f"Not drawn: {'; '.join(missing)}."] if missing else []
    return Plot(
        key,
        f"KL divergence over bits per weight: {', '.join(where)}",
        " ".join(notes),
        "; ".join(point.told for point in points),
        height,
        tuple(Tick(f"{tick}", round(x(tick), 1)) for tick in _BIT_TICKS if _LEFT <= x(tick) <= _RIGHT),
        tuple(Tick(f"{tick:g}", round(y(tick), 1)) for tick in _divergence_ticks(y, height)),
        points,
    )


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


def _told(row: Row) -> str:
    bits, divergence = (row.cells[key].entries[0] for key in (_BITS, _DIVERGENCE))
    interval = f" ({divergence.interval})" if divergence.interval else ""
    return f"{bits.text} bits, {divergence.text}{interval} nats/token"


def _absence(row: Row) -> str:
    return "no divergence" if row.cells[_DIVERGENCE].sort_value == 0 else "unknown"


def _logarithmic(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """A scale that leaves a margin of 4 % of its length at both ends."""
    low, high = math.log(min(values)), math.log(max(values))
    if low == high:
        low, high = low - 1, high + 1
    margin = 0.04 * (high - low)
    low, high = low - margin, high + margin
    return lambda value: start + (math.log(value) - low) / (high - low) * (end - start)


def _divergence_ticks(y: Callable[[float], float], height: float) -> list[float]:
    every = [step * 10.0**power for power in range(-12, 4) for step in (1, 2, 5)]
    within = [tick for tick in every if _TOP <= y(tick) <= height - _BOTTOM]
    decades = [tick for tick in within if math.log10(tick) == round(math.log10(tick))]
    return decades if len(decades) >= 3 else within


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places ``gap`` apart and as near as can be to those wanted, which rise: isotonic regression by pooling."""
    pools: list[tuple[float, int]] = []
    for i, place in enumerate(wanted):
        total, count = place - i * gap, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            before = pools.pop()
            total, count = total + before[0], count + before[1]
        pools.append((total, count))
    starts = [total / count for total, count in pools for _ in range(count)]
    last = high - (len(wanted) - 1) * gap
    return [min(max(start, low), last) + i * gap for i, start in enumerate(starts)]
