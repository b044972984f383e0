"""An advice on one screen, and as plain values for JSON."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from llm_at_home.hardware.catalogue import Card, Price
from llm_at_home.planning.advice import CHAT, Advice, Candidate
from llm_at_home.planning.plan import prompt_tokens
from llm_at_home.planning.speed import MARLIN_ALONE, MEASURED
from llm_at_home.planning.training import accumulation
from llm_at_home.records.schema import Reading

UNKNOWN = "?"
SHOWN = 13  # rows on a screen
COMMANDS = 3
SHORTENED = re.compile(r"^(quant|adapter)\.")
# Runs that the planner was not fitted to; tests/planning/test_measured.py holds them within it.
MEMORY_ERROR = 0.05


def as_values(advice: Advice) -> dict[str, Any]:
    """The advice as JSON types: readings as in a record."""
    return {
        "task": advice.task,
        "model": advice.shape.name,
        "gpu": advice.card.name if advice.card else None,
        "budget": dataclasses.asdict(advice.budget) if advice.budget else None,
        "affordable": {card.name: dataclasses.asdict(price) for card, price in advice.affordable},
        "unpriced": {card.name: price.reason for card, price in advice.unpriced},
        "memory_error": MEMORY_ERROR,
        "api": dataclasses.asdict(advice.api),
        "configurations": [_values(advice, one) for one in advice.candidates],
        "left_out": dict(advice.left_out),
    }


def _values(advice: Advice, one: Candidate) -> dict[str, Any]:
    return {
        "overrides": list(one.words),
        "dtype": one.config["dtype"],
        "command": command(advice, one),
        "gpu": one.card.name,
        "best": one.best,
        "bits_per_weight": one.bits,
        "memory": dataclasses.asdict(one.memory),
        "kl_divergence_mean": dataclasses.asdict(one.loss),
        "exact_match": dataclasses.asdict(one.learned) if one.learned else None,
        "rate": dataclasses.asdict(one.speed.rate),
        "rate_error": one.speed.error,
        "rate_from": one.speed.why,
        "energy": dataclasses.asdict(one.speed.energy),
        "price_buy": dataclasses.asdict(one.card.price_buy),
        "rent": dataclasses.asdict(one.rent),
    }


def as_text(advice: Advice) -> str:
    """The advice on one screen."""
    lines = [*_head(advice), "", *_table(advice), "", *_commands(advice), "", *_notes(advice)]
    return "\n".join(lines)


def command(advice: Advice, one: Candidate) -> str:
    """What to type for it."""
    model = f"model={advice.config['model']['name']}"
    words = [model, *one.words, f"dtype={one.config['dtype']}"]
    if advice.task == CHAT:
        return " ".join(["python infer.py mode=chat", f"engine={one.speed.engine or 'eager'}", *words])
    return " ".join([f"python train.py data={advice.config['data']['name']}", *words, "gpu=cuda"])


def _head(advice: Advice) -> list[str]:
    config, shape = advice.config, advice.shape
    if advice.task == CHAT:
        what = f"one conversation of {prompt_tokens(config)} + {config['engine']['max_new_tokens']} tokens"
    else:
        data = config["data"]
        rows = data["batch_size"] * accumulation(config)
        what = f"{config['trainer']['max_steps']} steps of {rows} conversations of {data['max_length']} tokens"
    lines = [f"{shape.name} ({shape.parameters / 1e9:.2f}B parameters), {advice.task}: {what}"]
    if advice.budget:
        bought = ", ".join(f"{card.name} {price.value:,.0f}" for card, price in advice.affordable)
        lines.append(f"{advice.budget.amount:,.0f} {advice.budget.currency} buys: {bought}; below, the first")
    if advice.lacking:
        lines.append(f"  cards priced in other currencies are not compared: give {', '.join(advice.lacking)}")
    if advice.card:
        return lines + _prices(advice.card)
    lines.append("no card is named: each row is of the smallest card that it fits; give gpu=rtx4090, say, or budget=")
    for card in {one.card.name: one.card for one in advice.candidates[:SHOWN]}.values():
        lines += _prices(card)
    return lines


def _prices(card: Card) -> list[str]:
    return [
        f"gpu={card.name}: {card.memory:.2f} GB, {card.bandwidth:,.0f} GB/s; buy: {_price(card.price_buy)}",
        f"  rent: {_price(card.price_hour, ' an hour')}",
    ]


def _price(price: Price, each: str = "") -> str:
    if price.value is None:
        return f"unknown: {price.reason}"
    return f"{price.value:,.10g} {price.currency}{each} ({price.source}, {price.date})"


def _table(advice: Advice) -> list[str]:
    chat = advice.task == CHAT
    rate, energy, rent = ("tokens/s", "J/token", "rent, 1M tokens") if chat else ("steps/s", "J/step", "rent, the run")
    titles = ["", "configuration", "dtype", *([] if advice.card else ["card"]), "bits", "GB", "KL"]
    titles += [*([] if chat else ["learned"]), rate, energy, rent]
    words = 3 if advice.card else 4  # columns of words, the others are of numbers
    rows = [titles, *(_cells(advice, number, one) for number, one in enumerate(advice.candidates[:SHOWN], 1))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [" ".join(_padded(row, widths, words)) for row in rows]


def _padded(row: list[str], widths: list[int], words: int) -> Iterator[str]:
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.ljust(width) if i < words else cell.rjust(width)


def _cells(advice: Advice, number: int, one: Candidate) -> list[str]:
    chat = advice.task == CHAT
    about, most = ("", "") if one.speed.rate.method.startswith(MEASURED) else ("~", "<")
    name = " ".join(word.partition("=")[2] if "." not in word else SHORTENED.sub("", word) for word in one.words)
    return [
        *(f"{number}{'*' if one.best else ' '}", name, one.config["dtype"]),
        *([] if advice.card else [one.card.name]),
        *(f"{one.bits:.1f}", _figure(one.memory, 1), _figure(one.loss, 4)),
        *([] if one.learned is None else [_figure(one.learned, 0, "%")]),
        _figure(one.speed.rate, 0 if chat else 3, before=about),
        _figure(one.speed.energy, 1 if chat else 0, before=most),
        _figure(one.rent, 2, f" {one.rent.unit.partition('/')[0]}", about),
    ]


def _figure(reading: Reading, digits: int, after: str = "", before: str = "") -> str:
    if reading.value is None:
        return UNKNOWN
    value = 100 * reading.value if after == "%" else reading.value
    return f"{before}{value:,.{digits}f}{after}"


def _commands(advice: Advice) -> list[str]:
    return [f"{number}  {command(advice, one)}" for number, one in enumerate(advice.candidates[:COMMANDS], 1)]


def _notes(advice: Advice) -> list[str]:
    shown = advice.candidates[:SHOWN]
    lines = [
        f"GB  predicted, the process; within {MEMORY_ERROR:.0%} of runs it was not fitted to (one: 8%), on an H100",
        "KL  nats/token lost, measured on smollm2_135m and not on this model, where the order may be another",
    ]
    if any(one.best for one in shown):
        lines.insert(0, "*   no row is better in quality and as fast, or faster and as good")
    if advice.task != CHAT:
        lines.append(
            "learned  facts of the handbook that smollm2_135m, unquantized, answers after such fine-tuning; measured"
        )
    predicted = [one.speed.why for one in shown if one.speed.why and not one.speed.why.startswith(MEASURED)]
    if predicted:
        lines += ["~   predicted:", *(f"      {why}" for why in dict.fromkeys(predicted))]
        lines.append("<   at most: the card's power limit for the predicted time")
    unknown = [one for one in shown if one.speed.rate.value is None]
    other = [one for one in unknown if MARLIN_ALONE in str(one.speed.rate.reason)]
    for what, some in (
        ("not measured on a GPU", [one for one in unknown if one not in other]),
        (f"measured {MARLIN_ALONE}", other),
    ):
        if some:
            lines.append(f"?   {what}: {', '.join(' '.join(one.words) for one in some)}")
    if advice.task == CHAT:
        api = advice.api
        lines.append(
            f"API {f'unknown: {api.reason}' if api.value is None else f'{api.value:g} {api.unit} ({api.method})'}"
        )
    if advice.assistants:
        lines.append(
            f"{advice.shape.name} is a base model; assistants of its size: model={', '.join(advice.assistants)}"
        )
    if advice.left_out:
        first = "; ".join(f"{name}: {why}" for name, why in advice.left_out[:2])
        lines.append(f"left out, {len(advice.left_out)}: {first}")
    return lines
