"""What a run costs: the card, its rent, the same tokens from an API; each price with source and date."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.hardware.catalogue import Card, Price
from llm_at_home.planning.shape import Shape
from llm_at_home.records.schema import Reading

MILLION = 1e6
PRICES = Path(__file__).with_name("prices.yaml")
SAME_SIZE = 0.25  # a model within this share of a size has its price
AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Z]{3})")


def rent_of_tokens(rate: Reading, card: Card) -> Reading:
    """Rent of a million tokens at so many a second."""
    return _rent(rate, card, MILLION, "1M tokens")


def rent_of_steps(rate: Reading, card: Card, steps: int) -> Reading:
    """Rent of so many optimizer steps at so many a second."""
    return _rent(rate, card, float(steps), f"{steps:,} steps")


def _rent(rate: Reading, card: Card, units: float, what: str) -> Reading:
    price = card.price_hour
    if price.value is None:
        return Reading.unknown("USD", f"gpu={card.name} has no price by the hour: {price.reason}")
    unit = f"{price.currency}/{what}"
    if rate.value is None:
        return Reading.unknown(unit, str(rate.reason))
    return Reading(
        price.value * units / rate.value / 3600, unit, f"{rate.method.split(',')[0]}; {price.source}, {price.date}"
    )


def api_of_tokens(shape: Shape) -> Reading:
    """A million tokens of a model of this size from an API."""
    billions = shape.parameters / 1e9
    for size, price in api_prices():
        if size is not None and price.value is not None and abs(billions / size - 1) < SAME_SIZE:
            return Reading(price.value, f"{price.currency}/1M tokens", f"{price.source}, {price.date}")
    return Reading.unknown("USD/1M tokens", f"no price of a model of {billions:.1f}B parameters is known here")


@functools.cache
def api_prices() -> tuple[tuple[float | None, Price], ...]:
    """Of the shipped file: a model's size in billions of parameters, and the price of a million tokens."""
    import yaml

    entries = yaml.safe_load(PRICES.read_text(encoding="utf-8"))["api"]
    return tuple((entry.get("billions"), api_price(entry, str(PRICES))) for entry in entries)


def api_price(entry: Mapping[str, Any], where: str) -> Price:
    """The price in one entry of ``api``, which beside it has a name and may have a size.

    Raises:
        Refusal: for a price without currency, source and date.
    """
    return Price.from_config({key: value for key, value in entry.items() if key not in ("name", "billions")}, where)


@dataclass(frozen=True)
class Budget:
    """An amount to spend on a card.

    Attributes:
        rates: what one unit of another currency costs in this one, as the user gave it; none is known here.
    """

    amount: float
    currency: str
    rates: Mapping[str, float | None]

    @classmethod
    def of(cls, text: str, rates: Mapping[str, Any]) -> Budget:
        """Read ``2000USD``.

        Raises:
            Refusal: for anything else, and for a rate that is no positive number.
        """
        found = AMOUNT.fullmatch(str(text).strip().upper().replace("€", "EUR").replace("$", "USD"))
        if found is None or float(found[1]) <= 0:
            raise Refusal(f"budget={text} is no amount: give a number and a currency, such as budget=2000USD")
        for currency, rate in rates.items():
            if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or rate <= 0):
                raise Refusal(f"rates.{currency}={rate} is no rate: give what one {currency} costs in {found[2]}")
        return cls(float(found[1]), found[2], rates)

    def lacking(self, cards: Sequence[Card]) -> list[str]:
        """The keys of the rates without which a card's price is not known in this currency."""
        prices = [card.price_buy for card in cards if card.price_buy.value is not None]
        others = {str(price.currency) for price in prices if price.currency != self.currency}
        return [f"rates.{name}" for name in sorted(others) if self.rates.get(name) is None]

    def buys(self, price: Price) -> Reading:
        """The price in this currency; unknown without one, or without a rate."""
        if price.value is None:
            return Reading.unknown(self.currency, str(price.reason))
        if price.currency == self.currency:
            return Reading(price.value, self.currency, f"{price.source}, {price.date}")
        rate = self.rates.get(str(price.currency))
        if rate is None:
            return Reading.unknown(self.currency, f"priced in {price.currency}: give rates.{price.currency}=")
        return Reading(price.value * rate, self.currency, f"{price.source}, {price.date}, at your rate of {rate:g}")
