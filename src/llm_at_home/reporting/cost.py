"""What a million generated tokens cost: electricity, a rented or a bought card, and what a provider asks."""

from __future__ import annotations

from llm_at_home.hardware.catalogue import Card, Price, load_catalogue
from llm_at_home.records.schema import Reading
from llm_at_home.reporting import entries, facts
from llm_at_home.reporting.cells import NO_READING, Cell, Column, Entry, Row, Table, number, text, unknown
from llm_at_home.reporting.figures import told_apart
from llm_at_home.reporting.load import Loaded, Run
from llm_at_home.reporting.marks import Group, Line, Marked, draw
from llm_at_home.reporting.prices import Prices
from llm_at_home.reporting.tables import EMULATED, MARK_NOTES, marks_of

_MILLION = 1e6
_SPEED, _ENERGY = "output_tokens_per_second", "energy_per_token"
_OTHER = "this card has no such price, or one in another currency: see conf/gpu"
_MOST = 16  # dots in the figure


def table(loaded: Loaded, prices: Prices) -> Table | None:
    """A row for each inference run on a card of the catalogue, cheapest to rent first; None without one."""
    cards = {card.title: card for card in load_catalogue().values()}
    runs = [run for run in loaded.runs if run.record.task == "infer" and run.record.status == "ok"]
    # An emulated card's speed is its host's, and so no price of either.
    runs = [run for run in runs if facts.host(run.record) in cards and EMULATED not in marks_of(run.record, "cost")]
    rows = [_row(run, cards[facts.host(run.record)], prices) for run in runs]
    if not rows:
        return None
    columns = _columns(rows, prices)
    rents = [column.key for column in columns if column.key.startswith("rent")]
    rows = [Row(_filled(row.cells, columns), row.source, row.marks, row.run) for row in rows]
    rows.sort(key=lambda row: (str(row.cells["model"].sort_value), *(_value(row, key) for key in rents)))
    return Table(
        "cost",
        "Cost of a million tokens",
        "From the measured rate, prompts included, and the measured energy of the card (not of the machine around it). "
        "Rent is the card's price by the hour in conf/gpu; electricity and a bought card's hours are yours to set.",
        columns,
        tuple(rows),
        MARK_NOTES,
    )


def figure(table: Table, prices: Prices) -> tuple[Marked, ...]:
    """Rent of a million tokens of the cheapest runs of each model, with providers' prices in the same currency."""
    made: list[Marked] = []
    models = dict.fromkeys(str(row.cells["model"].sort_value) for row in table.rows)
    rents = [column for column in table.columns if column.key.startswith("rent")]
    for model, column in ((model, column) for model in models for column in rents):
        key, unit = column.key, column.unit
        rows = [row for row in table.rows if row.cells["model"].sort_value == model]
        rows = [row for row in rows if row.cells[key].sort_value is not None]
        lines = [
            Line(price.value, f"API, {name}: {price.value:.2f} {price.currency} ({price.date})")
            for name, price in prices.api.items()
            if price.value is not None and price.currency == unit
        ]
        if len(rows) < 2:
            continue
        shown = rows[:_MOST]
        notes = ["Less is better; the scale is logarithmic."]
        notes += [f"The cheapest {_MOST} of {len(rows)} runs."] if len(rows) > _MOST else []
        notes += ["Lines: what a provider asks. An API's price is of its own model and date."] if lines else []
        names = told_apart([_label(row) for row in shown], shown, [""] * len(shown))
        groups = [Group(name, (_value(row, key),), (row.source,)) for name, row in zip(names, shown, strict=True)]
        made.append(
            draw(
                f"cost-{len(made)}",
                f"Rent of a million tokens: {model}",
                " ".join(notes),
                (f"ours, {unit}",),
                groups,
                lines,
                unit or "",
                logarithmic=True,
                decimals=2,
            )
        )
    return tuple(made)


def _label(row: Row) -> str:
    quant, dtype, batch = (row.cells[key].entries[0].text for key in ("quant", "dtype", "batch_size"))
    return f"batch {batch}: {quant}, {dtype}"


def _columns(rows: list[Row], prices: Prices) -> tuple[Column, ...]:
    return (
        Column("model", "Model", kind="text"),
        Column("quant", "Quant", kind="text"),
        Column("dtype", "Dtype", kind="text"),
        Column("device", "Device", kind="text"),
        Column("engine", "Engine", kind="text"),
        Column("batch_size", "Batch", decimals=0),
        Column("speed", "with prompts", "Measured", unit="tokens/s", decimals=1, better="higher"),
        Column("energy", "energy", "Measured", unit="kWh", decimals=3, better="lower"),
        Column("electricity", "electricity", "A million tokens", unit=prices.electricity.currency, better="lower"),
        *_priced(rows, "rent", "card rented"),
        *_priced(rows, "buy", "card bought"),
    )


def _priced(rows: list[Row], kind: str, title: str) -> list[Column]:
    """A column for each currency that cards are priced in: amounts in two currencies are nothing to compare."""
    keys = sorted({key for row in rows for key in row.cells if key.startswith(f"{kind}_")})
    return [Column(key, title, "A million tokens", unit=key.removeprefix(f"{kind}_"), better="lower") for key in keys]


def _filled(cells: dict[str, Cell], columns: tuple[Column, ...]) -> dict[str, Cell]:
    return {column.key: cells.get(column.key, Cell((unknown(_OTHER),))) for column in columns}


def _row(run: Run, card: Card, prices: Prices) -> Row:
    record = run.record
    rate, joules = record.readings.get(_SPEED), record.readings.get(_ENERGY)
    kwh = _kwh(joules)
    seconds = _MILLION / rate.value if rate and rate.value else None
    unmeasured = (rate.reason if rate else None) or entries.unmeasured(record)
    cells = {
        "model": text(facts.model(record), run.path),
        "quant": text(", ".join(facts.quant_words(record))),
        "dtype": text(facts.name_at(record.config, "dtype")),
        "device": text(facts.device(record)),
        "engine": text(facts.name_at(record.config, "engine", "name")),
        "batch_size": Cell((entries.batch_size(run),)),
        "speed": Cell((Column("s", "", unit="tokens/s", decimals=1).entry(rate, run.path),)),
        "energy": Cell((Column("e", "", unit="kWh", decimals=3).entry(kwh, run.path),)),
        "electricity": Cell((_electricity(kwh, prices, run),)),
        _key("rent", card.price_hour): Cell(
            (_paid(seconds, unmeasured, card.price_hour, 1.0, f"{card.name} by the hour", run),)
        ),
        _key("buy", card.price_buy): Cell((_bought(seconds, unmeasured, card, prices, run),)),
    }
    return Row(cells, run.path, marks_of(record, "cost"), run)


def _key(kind: str, price: Price) -> str:
    return f"{kind}_{price.currency}" if price.currency else kind


def _kwh(joules: Reading | None) -> Reading:
    if joules is None or joules.value is None:
        return Reading.unknown("kWh", joules.reason or NO_READING if joules else NO_READING)
    return Reading(joules.value * _MILLION / 3.6e6, "kWh", f"{joules.method}, of a million tokens")


def _electricity(kwh: Reading, prices: Prices, run: Run) -> Entry:
    price = prices.electricity
    if price.value is None:
        return unknown(price.reason or NO_READING)
    if kwh.value is None:
        return unknown(kwh.reason or NO_READING)
    return _amount(kwh.value * price.value, price, run, "of a kWh")


def _bought(seconds: float | None, unmeasured: str, card: Card, prices: Prices, run: Run) -> Entry:
    if card.price_buy.value is not None and prices.card_hours is None:
        return unknown(prices.card_hours_reason)
    hours = prices.card_hours or 1.0
    return _paid(seconds, unmeasured, card.price_buy, hours, f"{card.name} over {hours:,.0f} hours", run)


def _paid(seconds: float | None, unmeasured: str, price: Price, hours: float, what: str, run: Run) -> Entry:
    if price.value is None:
        return unknown(price.reason or NO_READING)
    if seconds is None:
        return unknown(unmeasured)
    return _amount(seconds / 3600 * price.value / hours, price, run, what)


def _amount(value: float, price: Price, run: Run, what: str) -> Entry:
    detail = f"{price.value:g} {price.currency} {what}: {price.source}, {price.date}"
    return Entry(number(value, 2), value, detail=detail, source=run.path)


def _value(row: Row, key: str) -> float:
    value = row.cells[key].sort_value
    return value if isinstance(value, float) else float("inf")
