from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from llm_at_home.data.passages import load_passages
from llm_at_home.errors import Refusal
from llm_at_home.evaluation.context import Context
from llm_at_home.records.hashing import config_hash
from llm_at_home.tasks import resolve

CONF = Path(__file__).resolve().parents[2] / "conf"
TALK = [
    {"role": "system", "content": "Answer from the handbook."},
    {"role": "user", "content": "Who designed the Heron chime?"},
    {"role": "assistant", "content": "Silas Moor"},
    {"role": "user", "content": "What does it cost?"},
]


def config(*overrides: str) -> dict[str, Any]:
    words = ["task=text", "gpu=cpu", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolve.resolve("evaluate", compose("evaluate", words), words)


def context(**options: Any) -> Context:
    return Context({**config()["text"], **options}, "handbook")


def prompted(made: Context, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    return made.prompted(messages, made.passages(messages))


def test_without_context_the_conversation_is_as_it_was() -> None:
    assert prompted(context(), TALK) == TALK
    assert context().passages(TALK) == []


def test_all_facts_stand_in_the_system_message_and_nowhere_else() -> None:
    made = prompted(context(context="all", instruction="Be brief."), TALK)
    assert made[0]["content"] == "Answer from the handbook. Be brief.\n\n" + "\n".join(load_passages("handbook"))
    assert made[1:] == TALK[1:]


def test_a_conversation_without_a_system_message_gets_one() -> None:
    made = prompted(context(context="all"), TALK[1:])
    assert made == [{"role": "system", "content": "\n".join(load_passages("handbook"))}, *TALK[1:]]
    assert prompted(context(instruction="Be brief."), TALK[1:])[0] == {"role": "system", "content": "Be brief."}


def test_a_follow_up_finds_what_was_named_before_but_not_by_what_was_answered() -> None:
    made = context(context="retrieved", retrieved=3)
    assert "The price of the Heron chime is 135 pounds." in made.passages(TALK)
    answered = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Silas Moor"}, TALK[3]]
    assert not [passage for passage in made.passages(answered) if "Silas" in passage]


def test_no_more_passages_than_asked_for() -> None:
    numbers = [len(context(context="retrieved", retrieved=n).passages(TALK)) for n in (1, 2)]
    assert numbers == [1, 2]


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["text.context=some"], "text.context=some is unknown: choose one of none, all, retrieved"),
        (["text.context=retrieved", "text.retrieved=0"], "text.retrieved=0 is too small"),
        (["text.context=all", "data=guanaco"], "data=guanaco brings no passages: give text.context_path=FILE"),
        (["text.context_path=/nowhere.txt"], "needs text.context=all or retrieved"),
        (["text.context=all", "text.context_path=/nowhere.txt"], "/nowhere.txt does not exist"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(overrides, why) -> None:
    with pytest.raises(Refusal, match=why) as refused:
        resolve.check("evaluate", config(*overrides))
    assert len(str(refused.value).splitlines()) == 1


def hashed(*overrides: str) -> str:
    made = config(*overrides)
    return config_hash(made, resolve.ingredients("evaluate", made))


def test_the_hash_covers_the_passages_and_not_where_they_lie(tmp_path) -> None:
    one, copy, other = tmp_path / "one.txt", tmp_path / "copy.txt", tmp_path / "other.txt"
    one.write_text("The gate is red.\n")
    copy.write_text("The gate is red.\n")
    other.write_text("The gate is blue.\n")
    by_file = [hashed("text.context=all", f"text.context_path={path}") for path in (one, copy, other)]
    assert by_file[0] == by_file[1] != by_file[2]
    by_choice = {
        hashed(*words)
        for words in (
            [],
            ["text.context=all"],
            ["text.context=retrieved"],
            ["text.context=retrieved", "text.retrieved=3"],
            ["text.instruction=Brief"],
        )
    }
    assert len(by_choice) == 5
