"""Two fidelity runs against each other, passage by passage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_at_home.errors import Refusal
from llm_at_home.evaluation.fidelity import HELD_OUT, OWN_ANSWERS, ROWS, SUFFIXES
from llm_at_home.evaluation.fidelity.figures import FIGURES, Sums
from llm_at_home.evaluation.statistics import bootstrap_draws, interval95, smallest_detectable
from llm_at_home.pruning.naming import prune_words
from llm_at_home.quantization.naming import quant_words
from llm_at_home.records import store
from llm_at_home.records.jsonl import read_jsonl
from llm_at_home.records.schema import Record

# What two draws of answers to the same questions must share to be a control of the draw.
SAME_BUT_FOR_THE_DRAW = ("model", "quant", "dtype", "gpu", "seed", "limit")


@dataclass(frozen=True)
class Run:
    """One fidelity run: its record and the rows of its passages."""

    folder: Path
    record: Record
    rows: list[dict[str, Any]]

    @classmethod
    def load(cls, folder: Path | str) -> Run:
        """Read a run folder.

        Raises:
            Refusal: when it holds no finished fidelity run, or one of before the rows had all that is needed.
        """
        record, place = store.load(folder), store.run_folder(folder)
        if record.config.get("task") != "fidelity" or record.status != "ok":
            raise Refusal(f"{folder} holds no finished fidelity run: run `python evaluate.py task=fidelity` first")
        file = place / ROWS
        if not file.is_file() or not sets_of(record):
            raise Refusal(f"{folder} lacks {ROWS} or the hashes of its texts: run it again with rerun=true")
        return cls(place, record, list(read_jsonl(file)))

    @property
    def name(self) -> str:
        """The quantization in a few words, and the draw of answers where it is not the first."""
        seed = self.record.config["fidelity"].get("answers_seed", 0)
        return describe(self.record.config) + (f", answers' seed {seed}" if seed else "")


def sets_of(record: Record) -> dict[str, dict[str, str]]:
    """For each set of passages that a run was measured on, the hashes of its texts and of the baseline there."""
    found = record.provenance.get("fidelity")
    return found if isinstance(found, dict) else {}


def describe(config: Mapping[str, Any]) -> str:
    """Quantization and pruning in a few words: bits and group size where the name alone does not tell them."""
    words = [*quant_words(config["quant"]), *prune_words(config.get("prune"))]
    if config["quant"]["name"] == "none" or config["dtype"] != config["fidelity"]["baseline_dtype"]:
        words.append(config["dtype"])
    return ", ".join(words)


@dataclass(frozen=True)
class Difference:
    """A figure of two runs; the interval and the smallest detectable size are those of a - b, from paired draws."""

    figure: str
    unit: str
    a: float
    b: float
    interval95: tuple[float, float]
    detectable: float
    n: int

    @property
    def difference(self) -> float:
        """a - b."""
        return self.a - self.b

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies wholly on one side of zero."""
        return self.interval95[0] > 0 or self.interval95[1] < 0


def compare(a: Run, b: Run, only: str | None = None) -> list[Difference]:
    """Every figure of run ``a`` less that of run ``b``, with a paired bootstrap over the passages of both.

    ``only`` names the one that is wanted, as in the record, and spares the draws of the others.

    Two runs of the same quantization under two ``fidelity.answers_seed`` are a control: only figures on the baseline's
    own answers are compared then, question by question, and what they differ by is the noise of the draw.

    Raises:
        Refusal: for runs on different texts, baselines or settings.
    """
    sets = _comparable(a.record, b.record)
    found = []
    for name in sets:
        both = [Sums.of(run.rows, name) for run in (a, b)]
        if len(both[0]) != len(both[1]) or len(both[0]) < 2:
            raise Refusal(f"{a.folder} and {b.folder} do not hold two or more texts of {name} each: run them again")
        for figure, (unit, statistic) in FIGURES.items():
            if only not in (None, figure + SUFFIXES[name]):
                continue
            difference = _difference(figure + SUFFIXES[name], unit, statistic, *both)
            if difference is not None:
                found.append(difference)
    return found


def is_control(a: Record, b: Record) -> bool:
    """Whether two runs are the same but for the seed of the baseline's answers."""
    same = all(a.config.get(key) == b.config.get(key) for key in SAME_BUT_FOR_THE_DRAW)
    same &= prune_words(a.config.get("prune")) == prune_words(b.config.get("prune"))
    seeds = [record.config["fidelity"].get("answers_seed") for record in (a, b)]
    return same and seeds[0] != seeds[1]


def _comparable(a: Record, b: Record) -> list[str]:
    """The sets of passages that both runs can be compared on."""
    settings = [
        {key: value for key, value in record.config["fidelity"].items() if key != "answers_seed"} for record in (a, b)
    ]
    for key in sorted({*settings[0], *settings[1]}):
        values = [one.get(key) for one in settings]
        if values[0] != values[1]:
            raise Refusal(f"the runs differ in fidelity.{key} ({values[0]} and {values[1]}): run both with the same")
    sets = [sets_of(record) for record in (a, b)]
    if sets[0].keys() != sets[1].keys():
        raise Refusal("the runs were measured on different sets of texts: run both with the same settings")
    if is_control(a, b) and OWN_ANSWERS in sets[0]:
        _require_same(HELD_OUT, sets)
        return [OWN_ANSWERS]
    for name in sets[0]:
        _require_same(name, sets)
    return list(sets[0])


def _require_same(name: str, sets: list[dict[str, dict[str, str]]]) -> None:
    for what, hint in (
        ("texts", "give both the same model, limit and fidelity.answers_seed"),
        ("baseline", "run both on one machine with the same package versions"),
    ):
        if sets[0][name][what] != sets[1][name][what]:
            raise Refusal(f"the runs' {what} of {name} differ: {hint}")


def _difference(name: str, unit: str, statistic: Any, a: Sums, b: Sums) -> Difference | None:
    with np.errstate(over="ignore", invalid="ignore"):
        every = np.arange(len(a))
        values = [statistic(sums, every) for sums in (a, b)]
        draws = bootstrap_draws(len(a), lambda i: statistic(a, i) - statistic(b, i))
    if not (all(map(math.isfinite, values)) and np.isfinite(draws).all()):
        return None
    return Difference(name, unit, values[0], values[1], interval95(draws), smallest_detectable(draws), len(a))


def as_text(a: Run, b: Run, differences: list[Difference]) -> str:
    """The comparison for a terminal: one figure a line."""
    lines = [f"a: {a.name}  ({a.folder})", f"b: {b.name}  ({b.folder})"]
    if is_control(a.record, b.record):
        lines.append("the same quantization under two draws of the baseline's answers: what differs is noise")
    titles = ("figure", "a", "b", "a - b", "95 % interval", "excludes 0", "detectable")
    lines.append(_line(titles))
    lines += [
        _line(
            (
                one.figure,
                f"{one.a:.5g}",
                f"{one.b:.5g}",
                f"{one.difference:+.4g}",
                f"[{one.interval95[0]:+.4g}, {one.interval95[1]:+.4g}]",
                "yes" if one.excludes_zero else "no",
                f"{one.detectable:.3g}",
            )
        )
        for one in differences
    ]
    return "\n".join(lines)


def _line(cells: tuple[str, ...]) -> str:
    widths = (32, 10, 10, 11, 24, 11, 10)
    return " ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()
