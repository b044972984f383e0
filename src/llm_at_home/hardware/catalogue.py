"""The cards of conf/gpu: what each offers, what it can compute and what it costs, typed and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from llm_at_home.errors import Refusal

CATALOGUE = Path(__file__).resolve().parents[3] / "conf" / "gpu"
DTYPES = ("float32", "tf32", "float16", "bfloat16", "int8", "fp8")
BFLOAT16 = (8, 0)  # the compute capability from which on a chip has it


@dataclass(frozen=True)
class Price:
    """An amount with where and when it was asked; ``value`` None with the ``reason`` why there is none."""

    value: float | None = None
    currency: str | None = None
    source: str | None = None
    date: str | None = None
    reason: str | None = None

    @classmethod
    def from_config(cls, entry: Mapping[str, Any], where: str) -> Price:
        """Read and check one price.

        Raises:
            Refusal: for an amount without currency, source or date, and for none without a reason.
        """
        _known(entry, cls, where)
        price = cls(**entry)
        if price.value is None and not price.reason:
            raise Refusal(f"{where} is unknown without a reason: say why")
        if price.value is not None:
            _positive(price.value, f"{where}.value")
            if not (price.currency and price.source and price.date):
                raise Refusal(f"{where} needs a currency, a source and a date")
        return price


@dataclass(frozen=True)
class Card:
    """One card of the catalogue.

    Attributes:
        title: the name that the driver gives it.
        memory: GB of 10^9 bytes that CUDA offers on it, which is less than is soldered on.
        bandwidth: GB/s.
        tflops: dense 10^12 operations/s by dtype; None where the chip has no unit for it.
        power_limit: W.
        price_buy, price_hour: of one card, and of one card for an hour.
    """

    name: str
    title: str
    memory: float
    memory_source: str
    bandwidth: float
    tflops: dict[str, float | None]
    compute_capability: tuple[int, int]
    power_limit: float
    source: str
    price_buy: Price
    price_hour: Price

    @classmethod
    def from_config(cls, group: Mapping[str, Any]) -> Card:
        """Read and check a ``gpu`` group that :func:`is_card`.

        Raises:
            Refusal: with the key that is missing or makes no sense.
        """
        where = f"gpu={group.get('name')}"
        entry = {key: value for key, value in group.items() if key != "device"}
        _known(entry, cls, where)
        missing = [field.name for field in fields(cls) if field.name not in entry]
        if missing:
            raise Refusal(f"{where} lacks {', '.join(missing)}")
        if tuple(entry["tflops"]) != DTYPES:
            raise Refusal(f"{where}: tflops has other dtypes than {', '.join(DTYPES)}")
        for key in ("memory", "bandwidth", "power_limit"):
            _positive(entry[key], f"{where}: {key}")
        for dtype, value in entry["tflops"].items():
            if value is not None:
                _positive(value, f"{where}: tflops.{dtype}")
        prices = {key: Price.from_config(entry[key], f"{where}: {key}") for key in ("price_buy", "price_hour")}
        return cls(**{**entry, **prices, "compute_capability": capability(entry["compute_capability"], where)})

    @property
    def capability_text(self) -> str:
        """The compute capability as NVIDIA writes it: ``8.6``."""
        return ".".join(map(str, self.compute_capability))


def is_card(group: Mapping[str, Any]) -> bool:
    """Whether a ``gpu`` group names a card of the catalogue, and not auto, cpu or cuda."""
    return "title" in group


def capability(value: Any, where: str = "compute_capability") -> tuple[int, int]:
    """A compute capability such as ``"8.6"`` as numbers that compare.

    Raises:
        Refusal: when it is not of that form.
    """
    parts = str(value).split(".")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise Refusal(f"{where}: compute capability {value} is not of the form 8.6")
    return int(parts[0]), int(parts[1])


def load_catalogue() -> dict[str, Card]:
    """Every card of conf/gpu by its name, the smallest memory first. It needs the checkout, not only the package.

    Raises:
        Refusal: when the folder is missing, or a file in it makes no sense.
    """
    import yaml

    if not CATALOGUE.is_dir():
        raise Refusal(f"there is no catalogue at {CATALOGUE}: run this from a checkout")
    entries = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(CATALOGUE.glob("*.yaml"))]
    cards = [Card.from_config(entry) for entry in entries if is_card(entry)]
    return {card.name: card for card in sorted(cards, key=lambda card: (card.memory, card.name))}


def _known(entry: Mapping[str, Any], cls: type, where: str) -> None:
    unknown = set(entry) - {field.name for field in fields(cls)}
    if unknown:
        raise Refusal(f"{where} has unknown keys: {', '.join(sorted(unknown))}")


def _positive(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise Refusal(f"{where} is {value}: give a positive number")
