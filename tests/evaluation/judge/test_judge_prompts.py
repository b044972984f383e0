import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_at_home.errors import Refusal
from llm_at_home.evaluation.judge.prompts import Templates, default_path, references

PUBLISHED = {
    ("single", 1, False): "single-v1",
    ("single", 1, True): "single-math-v1",
    ("single", 2, False): "single-v1-multi-turn",
    ("single", 2, True): "single-math-v1-multi-turn",
    ("pairwise", 1, False): "pair-v2",
    ("pairwise", 1, True): "pair-math-v1",
    ("pairwise", 2, False): "pair-v2-multi-turn",
    ("pairwise", 2, True): "pair-math-v1-multi-turn",
}


@pytest.mark.parametrize(("kind", "turn", "referenced"), PUBLISHED)
def test_templates_are_picked_by_their_published_names(templates_file, kind, turn, referenced) -> None:
    picked = Templates(templates_file).pick(kind, turn, referenced=referenced)
    assert picked.name == PUBLISHED[kind, turn, referenced]


def test_answers_with_braces_go_in_as_they_are(templates_file: Path) -> None:
    template = Templates(templates_file).pick("single", 1, referenced=False)
    system, user = template.messages(question="{x}", answer="{0} {answer} }")
    assert system == {"role": "system", "content": "Judge."}
    assert user["content"] == "single-v1: {x}|{0} {answer} }"


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="make setup"):
        Templates(tmp_path / "none.jsonl")


def test_a_template_without_its_value_and_a_file_without_a_template_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    row = {"name": "single-v1", "system_prompt": "s", "prompt_template": "{question} {mood}"}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(Refusal, match="mood"):
        Templates(path).pick("single", 1, referenced=False).messages(question="q")
    with pytest.raises(Refusal, match="pair-v2"):
        Templates(path).pick("pairwise", 1, referenced=False)
    path.write_text('{"name": "single-v1"}\n')
    with pytest.raises(Refusal, match="line 1"):
        Templates(path)


def test_references_are_shown_where_answers_are_right_or_wrong() -> None:
    def question(category, reference):
        return SimpleNamespace(question_id=1, category=category, turns=["a", "b"], reference=reference)

    assert references(question("math", ["x", "y"]), 1) == {"ref_answer_1": "x"}
    assert references(question("coding", ["x", "y"]), 2) == {"ref_answer_1": "x", "ref_answer_2": "y"}
    assert references(question("reasoning", ["x"]), 2) is None
    assert references(question("math", None), 1) is None
    assert references(question("writing", ["x", "y"]), 1) is None


def test_the_published_file_fills_in_for_every_kind_and_turn() -> None:
    if not default_path().is_file():
        pytest.skip(f"`make setup` has not put the published templates at {default_path()}")
    templates = Templates(default_path())
    values = {name: f"<{name}>" for name in ("question", "answer", "answer_a", "answer_b")}
    for number in (1, 2):
        for name in ("question", "answer", "answer_a", "answer_b", "ref_answer"):
            values[f"{name}_{number}"] = f"<{name}_{number}>"
    for (kind, turn, referenced), name in PUBLISHED.items():
        template = templates.pick(kind, turn, referenced=referenced)
        user = template.messages(**values)[1]["content"]
        assert template.name == name
        assert ("<ref_answer_1>" in user) == referenced
        assert ("question_2" in user) == (turn == 2)
