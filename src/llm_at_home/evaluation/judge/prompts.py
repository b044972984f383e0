"""The published judge templates, read as data; which one a question and turn need."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from llm_at_home.errors import Refusal

Kind = Literal["single", "pairwise"]

#: Categories whose answers are right or wrong: the judge sees a reference (Zheng et al. 2023, section 3.4).
REFERENCED = frozenset({"math", "reasoning", "coding"})
MAX_TURNS = 2

_STEMS: dict[tuple[str, bool], str] = {
    ("single", False): "single-v1",
    ("single", True): "single-math-v1",
    ("pairwise", False): "pair-v2",
    ("pairwise", True): "pair-math-v1",
}


class Question(Protocol):
    """What the judge needs to know of a question."""

    @property
    def question_id(self) -> int:
        """The number under which answers refer to it."""

    @property
    def category(self) -> str:
        """One of the set's categories, such as ``math``."""

    @property
    def turns(self) -> Sequence[str]:
        """What the user says, one or two turns."""

    @property
    def reference(self) -> Sequence[str] | None:
        """A right answer for each turn, where the set has one."""


@dataclass(frozen=True)
class Template:
    """One line of FastChat's ``judge_prompts.jsonl``."""

    name: str
    system: str
    prompt: str

    def messages(self, **values: str) -> list[dict[str, str]]:
        """The conversation that asks for one judgment.

        Raises:
            Refusal: when the template wants a value that is not given.
        """
        try:
            user = self.prompt.format(**values)
        except (KeyError, IndexError, ValueError) as error:
            raise Refusal(f"judge template {self.name} cannot be filled in: {error!r}") from None
        return [{"role": "system", "content": self.system}, {"role": "user", "content": user}]


class Templates:
    """The templates of one file, chosen by name.

    By name, because the file's other fields mislead: ``pair-math-v1-multi-turn`` calls itself "general".

    Args:
        path: FastChat's ``judge_prompts.jsonl``, or a file in its format.

    Raises:
        Refusal: when the file is missing or not in the format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise Refusal(f"the judge templates are not at {path}: run `make setup`, or set judge.templates=FILE")
        self._by_name: dict[str, Template] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                template = _template(line, f"line {number} of {path}")
                self._by_name[template.name] = template

    def pick(self, kind: Kind, turn: int, *, referenced: bool) -> Template:
        """The template for a turn (1 or 2), with or without reference answers.

        Raises:
            Refusal: when the file lacks it.
        """
        name = _STEMS[kind, referenced] + ("-multi-turn" if turn > 1 else "")
        if name not in self._by_name:
            raise Refusal(f"{self.path} has no judge template named {name}")
        return self._by_name[name]


def references(question: Question, turn: int) -> dict[str, str] | None:
    """The template values for the reference answers up to ``turn``, or None where none are to be shown."""
    known = question.reference
    if question.category not in REFERENCED or not known or len(known) < turn:
        return None
    return {f"ref_answer_{number}": known[number - 1] for number in range(1, turn + 1)}


def default_path() -> Path:
    """Where ``make setup`` puts the published templates."""
    from llm_at_home.paths import cache_dir

    return cache_dir() / "mt_bench" / "judge_prompts.jsonl"


def _template(line: str, where: str) -> Template:
    try:
        row = json.loads(line)
        return Template(row["name"], row["system_prompt"], row["prompt_template"])
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal(f"{where} is no judge template: {error!r}") from None
