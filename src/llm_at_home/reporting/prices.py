"""What the user pays: electricity, a bought card's hours and providers' prices, read and checked from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llm_at_home.errors import Refusal
from llm_at_home.hardware.catalogue import Price
from llm_at_home.planning.cost import PRICES, api_price

SHIPPED = PRICES
_KEYS = {"electricity", "card_hours", "api"}


@dataclass(frozen=True)
class Prices:
    """Prices with their sources.

    Attributes:
        electricity: of one kWh.
        card_hours: hours of work in which a bought card is paid off, or None.
        card_hours_reason: why there are none.
        api: a price of a million tokens by the model's name.
        path: the file, to which figures link.
    """

    electricity: Price
    card_hours: float | None
    card_hours_reason: str
    api: dict[str, Price]
    path: Path


def load(path: Path | str = SHIPPED) -> Prices:
    """Read a file like ``prices.yaml``; what it leaves out stays as shipped.

    Raises:
        Refusal: for a file that cannot be read, an unknown key, or a price without currency, source and date.
    """
    shipped, given = _read(SHIPPED), _read(Path(path))
    unknown = sorted(set(given) - _KEYS)
    if unknown:
        raise Refusal(f"{path} has unknown keys: {', '.join(unknown)}; it may have {', '.join(sorted(_KEYS))}")
    entry = {**shipped, **given}
    hours = entry["card_hours"]
    if not isinstance(hours, Mapping):
        raise Refusal(f"{path}: card_hours is {hours}: give value, or value: null with a reason")
    value = hours.get("value")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
        raise Refusal(f"{path}: card_hours is {value}: give a positive number of hours")
    return Prices(
        _price(entry["electricity"], f"{path}: electricity"),
        None if value is None else float(value),
        str(hours.get("reason") or "not set"),
        {name: price for name, price in (_named(one, f"{path}: api") for one in entry["api"] or [])},
        Path(path),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Refusal(f"{path} cannot be read as prices: {error}".replace("\n", " ")) from None
    if not isinstance(found, dict):
        raise Refusal(f"{path} holds no prices: copy {SHIPPED}")
    return found


def _named(entry: Any, where: str) -> tuple[str, Price]:
    if not isinstance(entry, Mapping) or not entry.get("name"):
        raise Refusal(f"{where}: each entry needs a name")
    return str(entry["name"]), api_price(entry, where)


def _price(entry: Any, where: str) -> Price:
    if not isinstance(entry, Mapping):
        raise Refusal(f"{where} is {entry}: give value, currency, source and date")
    return Price.from_config(entry, where)
