"""Turns facts.yaml into train.jsonl and test.jsonl: ``python -m llm_at_home.data.handbook.build``.

A fact is an entity and an attribute ("the showroom", its town). A template is a sentence with a place for the
entity; those of the test never occur in training. A test turn is a *near-duplicate* of a training turn when,
after lower-casing and dropping punctuation, their token sets have a Jaccard index of at least ``JACCARD``
or their texts match by a difflib ratio of at least ``RATIO``; ``tests/data/test_handbook.py`` finds none.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SEED = 20
JACCARD = 0.8
RATIO = 0.9
Row = dict[str, Any]
# A question, its answer, the fact it asks for (None for a refusal) and the template that worded it.
Turn = tuple[str, str, str | None, str]


@dataclass(frozen=True)
class Fact:
    """One thing that the handbook holds: ``answer`` to what ``attribute`` asks of ``entity``."""

    attribute: str
    entity: str
    answer: str

    @property
    def id(self) -> str:
        """A name such as ``town/the_showroom``."""
        return f"{self.attribute}/{self.entity.replace(' ', '_')}"


class Handbook:
    """The source file, and the turns that one split (``train`` or ``test``) can be made of."""

    def __init__(self, source: dict[str, Any], split: str) -> None:
        self.split = split
        self.system: str = source["system"]
        self.refusal: str = source["refusal"]
        self.attributes: dict[str, Any] = source["attributes"]
        self.another: list[str] = source["another"][split]
        self.facts = [
            Fact(name, entity, answer)
            for name, attribute in self.attributes.items()
            for entity, answer in attribute["facts"].items()
        ]

    def statements(self) -> list[str]:
        """Each fact as a sentence, in the order of the source file."""
        sentences = ((word(self.attributes[f.attribute]["statement"], f.entity), f.answer) for f in self.facts)
        return [sentence.replace("{a}", answer) for sentence, answer in sentences]

    def templates(self, attribute: str) -> list[str]:
        """The sentences that ask for an attribute in this split."""
        return list(self.attributes[attribute][self.split])

    def ask(self, fact: Fact, template: str) -> Turn:
        """A turn that asks for a fact; the template may leave the entity out (a follow-up)."""
        return word(template, fact.entity), fact.answer, fact.id, template

    def ask_unknown(self, entity: str, template: str) -> Turn:
        """A turn that asks for what the handbook does not hold."""
        return word(template, entity), self.refusal, None, template

    def follow_up(self, fact: Fact, rng: random.Random) -> Turn:
        """A turn that asks for a fact with a pronoun."""
        return self.ask(fact, rng.choice(self.attributes[fact.attribute]["follow_ups"][self.split]))

    def unknown(self) -> list[tuple[str, str]]:
        """Attribute and entity of what the handbook does not hold, in this split."""
        return [(name, entity) for name, a in self.attributes.items() for entity in a["unknown"][self.split]]

    def row(self, kind: str, number: int, turns: list[Turn]) -> Row:
        """A conversation of these turns; ``fact`` and ``template`` are those of the last one."""
        messages = [{"role": "system", "content": self.system}]
        for question, answer, _, _ in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        row_id = f"handbook-{self.split}-{kind}-{number:03d}"
        return {
            "id": row_id,
            "kind": kind,
            "fact": turns[-1][2],
            "template": turns[-1][3],
            "messages": messages,
        }


def word(template: str, entity: str) -> str:
    """The template with its entity, beginning with a capital letter."""
    text = template.replace("{e}", entity)
    return text[0].upper() + text[1:]


def chain(book: Handbook, rng: random.Random, facts: list[Fact]) -> list[Turn]:
    """Several facts of one entity, by pronoun after the first."""
    first, *others = rng.sample(facts, len(facts))
    opening = book.ask(first, rng.choice(book.templates(first.attribute)))
    return [opening, *(book.follow_up(fact, rng) for fact in others)]


def another(book: Handbook, rng: random.Random, fact: Fact) -> list[Turn]:
    """The same attribute of two or three entities; only the first question says which attribute."""
    others = [f for f in book.facts if f.attribute == fact.attribute and f != fact]
    picked = rng.sample(others, rng.choice([1, 2]))
    opening = book.ask(fact, rng.choice(book.templates(fact.attribute)))
    return [opening, *(book.ask(f, rng.choice(book.another)) for f in picked)]


def deal(rng: random.Random, turns: list[Turn]) -> list[list[Turn]]:
    """Unrelated questions in a row, two or three at a time, each turn once; what is left over joins the last."""
    deck = rng.sample(turns, len(turns))
    rows: list[list[Turn]] = []
    while len(deck) > 2:
        size = 2 + len(rows) % 2
        rows.append([deck.pop() for _ in range(size)])
    rows[-1] += deck
    return rows


def talks(book: Handbook, rng: random.Random, chains: int, others: int) -> list[list[Turn]]:
    """Conversations in which a question leans on the one before."""
    by_entity: dict[str, list[Fact]] = {}
    for fact in book.facts:
        by_entity.setdefault(fact.entity, []).append(fact)
    rich = [facts for facts in by_entity.values() if len(facts) > 1]
    made = [chain(book, rng, rich[number % len(rich)]) for number in range(chains)]
    return made + [another(book, rng, fact) for fact in rng.sample(book.facts, others)]


def refusals(book: Handbook) -> list[Turn]:
    """One question on each entity that the handbook does not hold, the templates by turns."""
    made = []
    for number, (attribute, entity) in enumerate(book.unknown()):
        templates = book.templates(attribute)
        made.append(book.ask_unknown(entity, templates[number % len(templates)]))
    return made


def number_rows(book: Handbook, kinds: dict[str, list[list[Turn]]]) -> list[Row]:
    """Rows of all kinds, one after the other."""
    return [book.row(kind, n, turns) for kind, made in kinds.items() for n, turns in enumerate(made)]


def build_train(source: dict[str, Any]) -> list[Row]:
    """All training conversations.

    Each fact is asked once in each template, and each unknown entity once: most alone, a part of them in
    dialogues, which teach more facts a token.
    """
    book, rng = Handbook(source, "train"), random.Random(SEED)
    alone: list[Turn] = []
    in_rows: list[Turn] = []
    for number, fact in enumerate(book.facts):
        for place, template in enumerate(book.templates(fact.attribute)):
            # Which two of the templates go into dialogues moves on from fact to fact.
            (in_rows if (place + number) % 4 == 0 else alone).append(book.ask(fact, template))
    unknown = refusals(book)
    refused_in_rows = unknown[::4]
    rows = deal(rng, in_rows)
    for turns, refused in zip(rows, refused_in_rows, strict=False):
        # Never last: a conversation that ends with a refusal would count as one.
        turns.insert(rng.randrange(len(turns)), refused)
    kinds = {
        "fact": [[turn] for turn in alone],
        "refusal": [[turn] for turn in unknown if turn not in refused_in_rows],
        "dialogue": rows + talks(book, rng, chains=24, others=16),
    }
    return number_rows(book, kinds)


def build_test(source: dict[str, Any]) -> list[Row]:
    """All test conversations; the last assistant message of each is the reference answer."""
    book, rng = Handbook(source, "test"), random.Random(SEED + 1)
    asked = [book.ask(fact, t) for fact in book.facts for t in book.templates(fact.attribute)]
    rows = deal(rng, asked)[:6]
    kinds = {
        "fact": [[book.ask(fact, t)] for fact in book.facts for t in book.templates(fact.attribute)[:2]],
        "refusal": [[turn] for turn in refusals(book)],
        "dialogue": rows + talks(book, rng, chains=8, others=4),
    }
    return number_rows(book, kinds)


def read_source() -> dict[str, Any]:
    """What ``facts.yaml`` holds."""
    import yaml

    return yaml.safe_load((HERE / "facts.yaml").read_text(encoding="utf-8"))


def statements() -> list[str]:
    """The handbook's facts, a sentence each; the answer stands in it word for word."""
    return Handbook(read_source(), "test").statements()


def build() -> dict[str, str]:
    """The text of ``train.jsonl`` and ``test.jsonl`` by file name."""
    source = read_source()
    rows = {"train.jsonl": build_train(source), "test.jsonl": build_test(source)}
    return {name: "".join(json.dumps(row) + "\n" for row in made) for name, made in rows.items()}


def main() -> None:
    """Writes the two files beside this one."""
    for name, text in build().items():
        (HERE / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
