"""What should I run? The configurations that fit a card, ranked by measured quality and by speed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.hardware.catalogue import Card
from llm_at_home.planning import cost, known_models, measurements, search, speed
from llm_at_home.planning.composing import CONF
from llm_at_home.planning.cost import Budget
from llm_at_home.planning.plan import Target, peaks, predict, prompt_tokens, settle
from llm_at_home.planning.shape import Shape
from llm_at_home.planning.speed import Speed
from llm_at_home.planning.weights import bits_per_weight
from llm_at_home.records.schema import Reading

CHAT, FINETUNE = "chat", "finetune"
TASKS = {CHAT: "infer", FINETUNE: "train"}  # and what of a plan each is
# What is compared, each a choice of conf/quant with further keys: what an answer or a training run may stand on.
QUANTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    CHAT: [
        *(("none", {}), ("int8", {}), ("int8_torchao", {}), ("gptq", {"bits": 8}), ("awq", {}), ("gptq", {})),
        *(("nf4", {}), ("nf4_nested", {}), ("int4_torchao", {}), ("gptq_mixed", {}), ("gptq", {"bits": 3})),
    ],
    FINETUNE: [("none", {}), ("int8", {}), ("nf4", {}), ("nf4_nested", {})],
}
ADAPTERS = ("lora", "adalora", "lokr")
# What trains in the least memory, for cards that none of the others fit: choices of further groups, and a small rank.
SMALLEST = {"memory": "smallest", "optimizer": "paged_adamw_8bit"}
SMALLEST_QUANTS, SMALLEST_RANK = ("nf4", "nf4_nested"), 8
FAST = "trainer=fast"


@dataclass(frozen=True)
class Candidate:
    """A configuration that fits.

    Attributes:
        words: the overrides that make it.
        loss: KL divergence of the base from the unquantized model, nats/token, on the embedded model.
        learned: facts answered after fine-tuning with this adapter, a share, on the embedded model; None for chat.
        memory: GB, of the process.
        rent: for a million tokens, or for the whole run.
        best: whether nothing else that fits is at least as good in both quality and speed.
    """

    words: tuple[str, ...]
    config: Mapping[str, Any]
    card: Card
    bits: float
    memory: Reading
    loss: Reading
    learned: Reading | None
    speed: Speed
    rent: Reading
    best: bool = False


@dataclass(frozen=True)
class Advice:
    """The answer.

    Attributes:
        card: that was asked for, or that the budget buys; None where each configuration has its smallest card.
        left_out: configurations that do not fit or cannot run, with why.
        assistants: for chat with a base model, those of like size that were trained to be one.
        affordable: cards that the budget buys, with their price in its currency, dearest memory first.
        unpriced: cards that it might buy, with why that is not known.
        lacking: the rates of exchange that would tell.
    """

    task: str
    shape: Shape
    config: Mapping[str, Any]
    card: Card | None
    candidates: list[Candidate]
    left_out: list[tuple[str, str]]
    api: Reading
    budget: Budget | None = None
    affordable: Sequence[tuple[Card, Reading]] = ()
    unpriced: Sequence[tuple[Card, Reading]] = ()
    lacking: Sequence[str] = ()
    assistants: Sequence[str] = ()


def advise(config: Mapping[str, Any], target: Target, cards: Sequence[Card], named: Collection[str]) -> Advice:
    """The configurations to choose from.

    Args:
        config: as ``conf/plan.yaml`` composes it; its model, data and lengths are kept.
        target: the card, or one without memory where none is meant.
        cards: of the catalogue, the smallest first.
        named: the keys that the user gave: a quantization or an adapter that was named is the only one.

    Raises:
        Refusal: where nothing fits, for a card that is not in the catalogue, and for a budget that buys none.
    """
    task, shape = config["task"], Shape.of(config["model"])
    if (config.get("prune") or {"name": "none"})["name"] != "none":
        raise Refusal(f"task={task} compares unpruned models: leave out prune=")
    budget = Budget.of(config["budget"], config["rates"]) if config["budget"] is not None else None
    if budget is not None and target.memory is not None:
        raise Refusal("give a card or a budget: leave out gpu= or budget=")
    if target.memory is not None and target.card is None:
        memory = target.memory
        nearest = min(cards, key=lambda card: abs(card.memory - memory))
        raise Refusal(
            "speed and cost are known of the catalogue's cards: name the nearest one with this one's memory, such as "
            f"gpu={nearest.name} gpu.memory={memory:.2f}"
        )
    affordable, unpriced = _affordable(budget, cards) if budget else ([], [])
    lacking = budget.lacking(cards) if budget else []
    if budget and not affordable:
        raise Refusal(
            f"budget={config['budget']} buys no card whose price is known in {budget.currency}: "
            f"{_too_little(budget, cards, lacking)}"
        )
    chosen = target.card or (affordable[0][0] if affordable else None)
    pool = [chosen] if chosen else cards
    found: list[Candidate] = []
    left_out: list[tuple[str, str]] = []
    fast = task == FINETUNE and "trainer" not in named
    for words, changed in _choices(config, named):
        candidate, why = _candidate(words, changed, shape, pool, fast)
        if candidate is not None:
            found.append(candidate)
        else:
            left_out.append((" ".join(words), why))
    if not found:
        where = f"gpu={chosen.name}" if chosen else "any card of the catalogue"
        smaller = _smaller(config, named, shape, pool, fast)
        hint = f"; there model={smaller} runs" if smaller else ""
        raise Refusal(
            f"nothing that was tried runs {shape.name} on {where}: {left_out[-1][0]}: {left_out[-1][1]}{hint}"
        )
    ranked = _ranked(found)
    api = cost.api_of_tokens(shape) if task == CHAT else Reading.unknown("USD", "fine-tuning by API is not priced here")
    assistants = known_models.assistants(shape) if task == CHAT and config["model"].get("chat_template") else []
    return Advice(
        *(task, shape, config, chosen, ranked, left_out, api, budget, affordable, unpriced, lacking, assistants)
    )


def _too_little(budget: Budget, cards: Sequence[Card], lacking: Sequence[str]) -> str:
    """What to change where a budget buys nothing."""
    prices = {card.name: budget.buys(card.price_buy).value for card in cards}
    known = [(price, name) for name, price in prices.items() if price is not None]
    hints = []
    if known:
        hints.append("the cheapest, gpu={1}, cost {0:,.0f}".format(*min(known)))
    if lacking:
        hints.append(f"give {', '.join(lacking)}, what one costs in {budget.currency}")
    return "; ".join(hints)


def _smaller(
    config: Mapping[str, Any], named: Collection[str], shape: Shape, pool: Sequence[Card], fast: bool
) -> str | None:
    """The largest model of ``conf/model`` below this one of which something fits, or None."""
    for name, group, one in known_models.smaller(shape):
        tried = _choices({**config, "model": group}, named)
        if any(_candidate(words, changed, one, pool, fast)[0] for words, changed in tried):
            return name
    return None


def _affordable(budget: Budget, cards: Sequence[Card]) -> tuple[list[tuple[Card, Reading]], list[tuple[Card, Reading]]]:
    """Cards within the budget, the most memory first and among equals the most bandwidth, and those without a price."""
    priced = [(card, budget.buys(card.price_buy)) for card in cards]
    within = [(card, price) for card, price in priced if price.value is not None and price.value <= budget.amount]
    unknown = [(card, price) for card, price in priced if price.value is None]
    return sorted(within, key=lambda pair: (-pair[0].memory, -pair[0].bandwidth)), unknown


def _choices(config: Mapping[str, Any], named: Collection[str]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Each quantization, and for fine-tuning with each adapter; of what the user named only that."""
    task = config["task"]
    quants: list[tuple[tuple[str, ...], Mapping[str, Any]]] = [
        ((f"quant={name}", *(f"quant.{key}={value}" for key, value in keys.items())), {**choice("quant", name), **keys})
        for name, keys in QUANTS[task]
    ]
    if any(name.split(".")[0] == "quant" for name in named):
        quants = [((f"quant={config['quant']['name']}",), config["quant"])]
    adapters: list[tuple[tuple[str, ...], Mapping[str, Any]]] = [((), {})]
    if task == FINETUNE:
        adapters = [((f"adapter={name}",), choice("adapter", name)) for name in ADAPTERS]
        if any(name.split(".")[0] == "adapter" for name in named):
            adapters = [((f"adapter={config['adapter']['name']}",), config["adapter"])]
    for quant_words, quant in quants:
        for adapter_words, adapter in adapters:
            changed = {**config, "task": TASKS[task], "quant": quant}
            yield (*quant_words, *adapter_words), changed | ({"adapter": adapter} if adapter else {})
    if task == FINETUNE and not {name.split(".")[0] for name in named} & {"adapter", *SMALLEST}:
        more = {group: choice(group, name) for group, name in SMALLEST.items()}
        more["adapter"] = {**choice("adapter", "lora"), "r": SMALLEST_RANK}
        keys = (f"adapter.r={SMALLEST_RANK}", *(f"{group}={name}" for group, name in SMALLEST.items()))
        small = [(words, quant) for words, quant in quants if quant["name"] in SMALLEST_QUANTS]
        for quant_words, quant in small[-1:]:
            words = (*quant_words, "adapter=lora", *keys)
            yield words, {**config, "task": TASKS[task], "quant": quant, **more}


def choice(group: str, name: str) -> dict[str, Any]:
    """A file of ``conf`` with those of its group that it builds on, as Hydra would compose it."""
    import yaml

    read: dict[str, Any] = yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    for one in read.pop("defaults", []):
        if isinstance(one, str) and one != "_self_":
            found |= choice(group, one)
    return found | read


def _candidate(
    words: tuple[str, ...], config: Mapping[str, Any], shape: Shape, cards: Sequence[Card], fast: bool
) -> tuple[Candidate | None, str]:
    """The configuration on the first of the cards that it fits, or why it fits none.

    With ``trainer=fast``, where that may be and its speed is known; else as it is.
    """
    why = ""
    for card in cards:
        target = Target.of(card)
        try:
            settled = settle(config, target)
            if fast and (found := _fast(words, settled, shape, card)):
                return found, ""
            prediction = predict(settled, target.capability)
        except Refusal as refusal:
            why = str(refusal)
            continue
        if not prediction.fits(card.memory):
            why = f"takes {prediction.process / 1e9:.1f} GB (predicted), gpu={card.name} offers {card.memory:.1f}"
            continue
        return _measured(words, settled, shape, card, peaks(prediction)["predicted_process_memory_peak"]), ""
    return None, why


def _fast(words: tuple[str, ...], config: Mapping[str, Any], shape: Shape, card: Card) -> Candidate | None:
    """The configuration as ``trainer=fast`` divides its step in the card's memory, or None where nothing tells."""
    graphed = {**config, "trainer": {**config["trainer"], "graph": "auto"}}
    try:
        choice = search.choose(graphed, search.USED * card.memory, card.compute_capability)
    except Refusal:
        return None
    settled = choice.apply(graphed)
    rate = speed.fast_training(settled, shape, card)
    if rate is None:
        return None
    memory = peaks(choice.prediction)["predicted_process_memory_peak"]
    return _measured((*words, FAST), settled, shape, card, memory, rate)


def _measured(
    words: tuple[str, ...],
    config: Mapping[str, Any],
    shape: Shape,
    card: Card,
    memory: Reading,
    rate: Speed | None = None,
) -> Candidate:
    quant, dtype = config["quant"], config["dtype"]
    if config["task"] == "train":
        rate, learned = rate or speed.training(config, shape, card), measurements.exact_match(config["adapter"])
        rent = cost.rent_of_steps(rate.rate, card, config["trainer"]["max_steps"])
    else:
        rate, learned = speed.decoding(config, shape, prompt_tokens(config), card), None
        rent = cost.rent_of_tokens(rate.rate, card)
    loss = measurements.kl_divergence(quant, dtype)
    return Candidate(words, config, card, bits_per_weight(shape, quant, dtype), memory, loss, learned, rate, rent)


def _ranked(found: Sequence[Candidate]) -> list[Candidate]:
    """Those that nothing beats in both quality and speed first; in each half the better quality, then the faster."""
    marked = [replace(one, best=_known(one) and not any(_beats(other, one) for other in found)) for one in found]
    return sorted(marked, key=lambda one: (not one.best, _loss(one), -_learned(one), -(one.speed.rate.value or 0.0)))


def _known(one: Candidate) -> bool:
    figures = [one.loss, one.speed.rate, *([] if one.learned is None else [one.learned])]
    return all(figure.value is not None for figure in figures)


def _beats(one: Candidate, other: Candidate) -> bool:
    """At least as good in everything, and better in something; what is unknown beats nothing."""
    if not _known(one):
        return False
    ours = (-_loss(one), _learned(one), one.speed.rate.value or 0.0)
    theirs = (-_loss(other), _learned(other), other.speed.rate.value or 0.0)
    return all(a >= b for a, b in zip(ours, theirs, strict=True)) and ours != theirs


def _loss(one: Candidate) -> float:
    return one.loss.value if one.loss.value is not None else float("inf")


def _learned(one: Candidate) -> float:
    return one.learned.value if one.learned is not None and one.learned.value is not None else 0.0
