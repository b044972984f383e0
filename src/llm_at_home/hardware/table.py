"""The catalogue as a Markdown table, which docs/gpus.md holds."""

from __future__ import annotations

from collections.abc import Iterable

from llm_at_home.hardware.catalogue import DTYPES, Card, Price

HEAD = ("`gpu=`", "card", "memory GB", "GB/s", *DTYPES, "capability", "W", "to buy", "per hour")


def markdown(cards: Iterable[Card]) -> str:
    """One row a card; a dash is what the chip lacks or what nobody lists. Sources are in the YAML files."""
    rows = [HEAD, ["---"] * len(HEAD), *(_row(card) for card in cards)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(card: Card) -> list[str]:
    tflops = [_number(card.tflops[dtype]) for dtype in DTYPES]
    figures = [_number(card.memory), _number(card.bandwidth), *tflops, card.capability_text, _number(card.power_limit)]
    return [f"`{card.name}`", card.title, *figures, _price(card.price_buy), _price(card.price_hour)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _price(price: Price) -> str:
    return "-" if price.value is None else f"{price.value:g} {price.currency} ({price.date})"
