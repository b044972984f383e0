"""A claim as its file gives it: what is said, where, on which records, and what figure would bear it out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llm_at_home.errors import Refusal

EFFECTS = ("value", "difference", "ratio")
KEYS = (
    *("claim", "source", "reading", "figure", "per", "effect", "records", "a", "b", "varies", "same"),
    *("below", "above"),
)


@dataclass(frozen=True)
class Claim:
    """One testable statement.

    Args:
        name: of the file, without its ending.
        claim: the statement.
        document: who says it.
        place: where in the document.
        reading: how the words became the threshold; empty where they name it themselves.
        figure: a reading's or a quality figure's name in the record.
        per: another figure of the same record by which it is divided, or None.
        effect: ``value`` of one run, or ``difference`` a - b or ``ratio`` a / b of two.
        records: what both runs are: dotted keys of the configuration (or ``task``, ``evaluation``, ``kernel.*``,
            ``subject.*`` for what an evaluation is about) to a value, or to a list of allowed ones.
        a: what the first run is besides.
        b: what the second one is besides; empty with ``effect: value``.
        varies: further keys, or groups, that the two may differ in.
        same: keys that the two share all the same, though ``a``, ``b`` or ``varies`` frees their group.
        below: the claim holds below this, in the figure's unit; None without such a bound.
        above: the claim holds above this.
    """

    name: str
    claim: str
    document: str
    place: str
    reading: str
    figure: str
    per: str | None
    effect: str
    records: Mapping[str, Any]
    a: Mapping[str, Any]
    b: Mapping[str, Any]
    varies: tuple[str, ...]
    same: tuple[str, ...]
    below: float | None
    above: float | None

    @property
    def bounds(self) -> tuple[float, float]:
        """The range in which the claim holds."""
        return (
            -math.inf if self.above is None else self.above,
            math.inf if self.below is None else self.below,
        )

    @property
    def threshold(self) -> str:
        """The same in words."""
        said = [f"above {self.above:g}"] if self.above is not None else []
        said += [f"below {self.below:g}"] if self.below is not None else []
        return " and ".join(said)


def read_all(folders: Sequence[Path | str]) -> list[Claim]:
    """The claims of every ``.yaml`` file in the folders, by name.

    Raises:
        Refusal: for a folder without claims, a name that two files share, or a malformed file.
    """
    claims: dict[str, Claim] = {}
    for folder in folders:
        files = sorted(Path(folder).glob("*.yaml"))
        if not files:
            raise Refusal(f"{folder} holds no claims: give a folder of YAML files, one a claim")
        for file in files:
            if file.stem in claims:
                raise Refusal(f"{file}: another claim is called {file.stem}: rename one")
            claims[file.stem] = read(file)
    return [claims[name] for name in sorted(claims)]


def read(file: Path) -> Claim:
    """One claim.

    Raises:
        Refusal: naming the file and the key that is wrong.
    """
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Refusal(f"{file}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise Refusal(f"{file}: a claim is a mapping of keys: {', '.join(KEYS)}")
    return _Parser(file, found).claim()


class _Parser:
    def __init__(self, file: Path, found: dict[Any, Any]) -> None:
        self._file = file
        self._found = found

    def claim(self) -> Claim:
        unknown = [str(key) for key in self._found if key not in KEYS]
        if unknown:
            raise self._wrong(unknown[0], f"no such key; there are {', '.join(KEYS)}")
        effect = self._text("effect")
        if effect not in EFFECTS:
            raise self._wrong("effect", f"{effect} is none of {', '.join(EFFECTS)}")
        below, above = self._number("below"), self._number("above")
        if below is None and above is None:
            raise self._wrong("below", "give below, above or both: the claim asserts nothing without")
        if below is not None and above is not None and below <= above:
            raise self._wrong("below", f"must be more than above ({above:g}), or nothing lies between")
        a, b = self._selection("a"), self._selection("b")
        if effect == "value" and b:
            raise self._wrong("b", "effect: value looks at one run; use records and a alone")
        if effect != "value" and not (a and b):
            raise self._wrong("b" if a else "a", f"effect: {effect} compares two runs; say what tells this one")
        source = self._found.get("source")
        if not isinstance(source, dict) or set(source) != {"document", "place"}:
            raise self._wrong("source", "give document and place")
        return Claim(
            self._file.stem,
            self._text("claim"),
            self._text("document", source),
            self._text("place", source),
            self._text("reading") if "reading" in self._found else "",
            self._text("figure"),
            self._text("per") if "per" in self._found else None,
            effect,
            self._selection("records"),
            a,
            b,
            self._names("varies"),
            self._names("same"),
            below,
            above,
        )

    def _wrong(self, key: str, why: str) -> Refusal:
        return Refusal(f"{self._file}: {key}: {why}")

    def _text(self, key: str, where: Mapping[str, Any] | None = None) -> str:
        value = (self._found if where is None else where).get(key)
        if not isinstance(value, str) or not value.strip():
            raise self._wrong(key, "must be text" if value is not None else "is missing")
        return " ".join(value.split())

    def _number(self, key: str) -> float | None:
        value = self._found.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if isinstance(value, str) else ""
            raise self._wrong(key, f"{value!r} is no number{hint}")
        return float(value)

    def _selection(self, key: str) -> dict[str, Any]:
        value = self._found.get(key, {})
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise self._wrong(key, "must map dotted keys of the configuration to values")
        for name, wanted in value.items():
            if isinstance(wanted, dict):
                raise self._wrong(f"{key}.{name}", "must be a value or a list of values; write nested keys with dots")
        return value

    def _names(self, key: str) -> tuple[str, ...]:
        value = self._found.get(key, [])
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self._wrong(key, "must be a list of keys")
        return tuple(value)
