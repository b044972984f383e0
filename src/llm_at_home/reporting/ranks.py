"""Geometry of the rank maps: which matrices an adapter that hands out ranks left with how many directions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llm_at_home.reporting import facts
from llm_at_home.reporting.cells import Table
from llm_at_home.reporting.figuredata import Data

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_LEFT, _WIDTH, _ROW, _TOP, _BOTTOM = 90.0, 700.0, 22.0, 6.0, 24.0
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Tile:
    """One matrix: its place, its rank as a share of the largest, and what a pointer over it is told."""

    x: float
    y: float
    share: float
    told: str


@dataclass(frozen=True)
class RankMap:
    """Decoder layers from left to right, kinds of matrices from top to bottom."""

    key: str
    title: str
    note: str
    description: str
    height: float
    tile: tuple[float, float]
    tiles: tuple[Tile, ...]
    kinds: tuple[tuple[str, float], ...]
    layers: tuple[tuple[str, float], ...]
    data: Data
    kind: ClassVar[str] = "ranks"
    wide: ClassVar[bool] = True
    width: float = _WIDTH
    left: float = _LEFT


def rank_maps(table: Table) -> tuple[RankMap, ...]:
    """A map for each run of the table whose record holds a rank pattern."""
    found = []
    for i, row in enumerate(table.rows):
        pattern = facts.at(row.run.record.adapter, "rank_pattern") if row.run else None
        if isinstance(pattern, dict) and row.run:
            name = f"{facts.quant(row.run.record)}, {facts.name_at(row.run.record.config, 'adapter', 'name')}"
            drawn = _map(f"{table.key}-ranks-{i}", name, pattern, row.source)
            found += [drawn] if drawn else []
    return tuple(found)


def _map(key: str, name: str, pattern: dict[str, int], source: Path) -> RankMap | None:
    placed = {}
    for matrix, rank in pattern.items():
        layer = _LAYER.search(f".{matrix}")
        if layer and isinstance(rank, int):
            placed[int(layer[1]), matrix.rpartition(".")[2]] = rank
    if not placed or not max(placed.values()):
        return None
    layers = sorted({layer for layer, _ in placed})
    kinds = sorted({kind for _, kind in placed}, key=_place)
    wide, most = (_WIDTH - _LEFT) / len(layers), max(placed.values())
    tiles = tuple(
        Tile(
            round(_LEFT + layers.index(layer) * wide, 1),
            round(_TOP + kinds.index(kind) * _ROW, 1),
            round(rank / most, 3),
            f"layer {layer}, {clean_kind}: rank {rank}",
        )
        for (layer, kind), rank in sorted(placed.items())
        for clean_kind in [facts.clean(kind)]
    )
    means = "; ".join(f"{facts.clean(kind)}: {_mean(placed, kind):.1f} on average" for kind in kinds)
    every = max(1, len(layers) // 10)
    return RankMap(
        key,
        f"Ranks that were left: {facts.clean(name)}",
        f"The fuller a tile’s colour, the higher its rank, up to {most}; an empty one has none.",
        means,
        _TOP + len(kinds) * _ROW + _BOTTOM,
        (round(max(wide - 2, 1), 1), _ROW - 2),
        tiles,
        tuple((facts.clean(kind), _TOP + i * _ROW + 15) for i, kind in enumerate(kinds)),
        tuple((str(layer), round(_LEFT + (i + 0.5) * wide, 1)) for i, layer in enumerate(layers) if i % every == 0),
        Data(
            ("layer", "matrix", "rank"),
            tuple((str(layer), facts.clean(kind), float(rank)) for (layer, kind), rank in sorted(placed.items())),
            (source,) * len(placed),
        ),
    )


def _place(kind: str) -> tuple[int, str]:
    return (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), kind)


def _mean(placed: dict[tuple[int, str], int], kind: str) -> float:
    ranks: Sequence[int] = [rank for (_, one), rank in placed.items() if one == kind]
    return sum(ranks) / len(ranks)
