"""The paper's Figure 1: what each method takes, against the memory and the price of popular cards."""

from __future__ import annotations

from collections.abc import Sequence

from llm_at_home.hardware.catalogue import Card, Price, load_catalogue
from llm_at_home.reporting.cells import Row, Table
from llm_at_home.reporting.marks import Group, Line, Marked, draw
from llm_at_home.reporting.paper import of_the_paper
from llm_at_home.reporting.tables import EMULATED

#: Of conf/gpu: what people have, what they buy for this, and what the paper measured on.
POPULAR = ("rtx4060", "rtx3060", "t4", "rtx4090", "rtx5090", "a100_40gb", "a6000", "h100")


def figure(tables: Sequence[Table]) -> Marked | None:
    """Memory of the rows of Tables I and III with the published figure beside ours; None where nothing is known."""
    # An emulated card holds what its host does; that it fits or not is in the table.
    rows = [(table, row) for table in tables for row in of_the_paper(table) if EMULATED not in row.marks]
    groups = [_group(table, row) for table, row in rows]
    groups = [group for group in groups if any(value is not None for value in group.values)]
    if not groups:
        return None
    devices = " and ".join(sorted({row.cells["device"].entries[0].text for _, row in rows if row.run}))
    lines = [Line(card.memory, _said(card)) for card in _popular()]
    top = max(value for group in groups for value in group.values if value is not None)
    # One card that holds everything is enough; larger ones would only make each bar shorter.
    larger = sorted(line.value for line in lines if line.value >= top)
    return draw(
        "memory",
        "Figure 1: memory of each method, and the cards that hold it",
        f"Less is better. Ours: the process on {devices or 'no card yet'}; published: on an A100. Dashed lines: what "
        "CUDA offers on a card. A price is as old as it says; a card that has none to buy is rented.",
        ("ours, GB", "published, GB"),
        groups,
        [line for line in lines if not larger or line.value <= larger[0]],
        "GB",
    )


def _group(table: Table, row: Row) -> Group:
    cells = [row.cells[key].entries[0] for key in ("memory", "memory_published")]
    values = tuple(entry.value if isinstance(entry.value, float) else None for entry in cells)
    task = "inference" if table.key == "table-1" else "fine-tuning"
    name = row.cells["method"].entries[0].text
    # The paper's name is enough where there is one, but its LoKr may be PEFT's own here or not; else what fits a phone.
    short = ", ".join(name.partition(" (")[0].split(", ")[:2]) + (" of PEFT" if "of PEFT" in name else "")
    dtype = row.cells["model"].entries[0].text.split(", ")[1:2] if row.run else []
    return Group(f"{task}: {', '.join([short, *dtype])}", values, tuple(entry.source for entry in cells))


def _popular() -> list[Card]:
    catalogue = load_catalogue()
    return [catalogue[name] for name in POPULAR if name in catalogue]


def _said(card: Card) -> str:
    name = card.title.removeprefix("NVIDIA ").removeprefix("GeForce ").removeprefix("Tesla ")
    return f"{name.split(' 80GB')[0]}: {card.memory:.1f} GB, {_price(card)}"


def _price(card: Card) -> str:
    for price, per in ((card.price_buy, ""), (card.price_hour, "/h")):
        if price.value is not None:
            return f"{_amount(price)}{per} ({price.date})"
    return "no price"


def _amount(price: Price) -> str:
    return (
        f"{price.value:,.0f} {price.currency}" if (price.value or 0) >= 100 else f"{price.value:.2f} {price.currency}"
    )
