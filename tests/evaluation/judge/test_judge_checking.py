"""A judge under test: judges whose habits are known get the figures that those habits are worth."""

import random
from types import SimpleNamespace

import pytest

from llm_at_home.errors import Refusal
from llm_at_home.evaluation.judge.checking import check_judge
from llm_at_home.evaluation.judge.planted import KINDS, corrupted, planted_sets

REFERENCES = {
    1: ("math", "The sum of 12 and 30 is 42 because two tens and thirty make 42."),
    2: ("writing", "Dear neighbours, the water will be off on Tuesday morning, so fill a jug."),
    3: ("math", "A train at 60 km per hour needs 2 hours for 120 km of track."),
}


@pytest.fixture
def known():
    return [
        SimpleNamespace(question_id=number, category=category, turns=[f"q{number}?", "and?"], reference=[text, ""])
        for number, (category, text) in REFERENCES.items()
    ]


def parts(body) -> tuple[str, list[str]]:
    """Question number and answers in a prompt of the test's templates."""
    rest = body["messages"][1]["content"].partition(": ")[2]
    question, *answers = rest.split("|")
    return question, answers


def is_reference(question: str, answer: str) -> bool:
    return answer == REFERENCES[int(question[1:-1])][1]


def test_what_is_planted_is_worse_and_the_same_again(known) -> None:
    sets = planted_sets(known)
    assert sets == planted_sets(known)
    texts = {kind: {row["question_id"]: row["choices"][0]["turns"][0] for row in rows} for kind, rows in sets.items()}
    for number, (_, reference) in REFERENCES.items():
        assert texts["reference"][number] == reference
        assert len({texts[kind][number] for kind in KINDS} | {reference}) == len(KINDS) + 1
        assert reference.startswith(texts["truncated"][number])
        assert texts["padded"][number].count(reference) == 3
    assert texts["off_topic"][1] == REFERENCES[2][1]
    assert texts["off_topic"][3] == REFERENCES[2][1], "the next question of another category, round the end"
    assert sorted(texts["corrupted"][2].split()) == sorted(REFERENCES[2][1].split())


def test_every_number_of_a_corrupted_answer_is_another() -> None:
    before, after = "1 and 22 make 23", corrupted("1 and 22 make 23", random.Random(0))
    assert all(a != b for a, b in zip(before.split()[::2], after.split()[::2], strict=True) if a.isdigit())
    assert after.split()[1] == "and"


def test_questions_without_references_cannot_plant_anything(known) -> None:
    with pytest.raises(Refusal, match="questions=home_bench"):
        planted_sets([known[0]])


def test_a_judge_that_knows_gets_full_marks(server, config, known, tmp_path) -> None:
    def judge(body):
        question, answers = parts(body)
        right = [is_reference(question, answer) or answer.count("say it once more") for answer in answers]
        if len(answers) == 1:
            return server.say("[[9]]" if right[0] else "[[2]]")
        return server.say("[[C]]" if right[0] and right[1] else "[[A]]" if right[0] else "[[B]]")

    server.default = judge
    quality, counts, _ = check_judge(config, known, tmp_path)
    values = {name: reading.value for name, reading in quality.items()}
    assert values["judge_accuracy"] == values["judge_accuracy_single"] == values["judge_consistency"] == 1
    assert values["judge_accuracy_off_topic"] == values["judge_accuracy_single_truncated"] == 1
    assert values["judge_length_bias"] == values["judge_position_bias"] == 0.5
    assert quality["judge_accuracy"].n == 3
    assert (counts["planted_pairs"], counts["judgments"], counts["judgments_missing"]) == (12, 27, 0)
    assert not any("ref=" in body["messages"][1]["content"] for body in server.bodies), "the judge was shown the answer"


def test_a_judge_that_takes_the_first_is_found_out(server, config, known, tmp_path) -> None:
    server.default = lambda body: server.say("[[5]]" if len(parts(body)[1]) == 1 else "[[A]]")
    quality, _, _ = check_judge(config, known, tmp_path)
    values = {name: reading.value for name, reading in quality.items()}
    assert (values["judge_position_bias"], values["judge_consistency"]) == (1, 0)
    assert (values["judge_accuracy"], values["judge_accuracy_single"]) == (0.5, 0.5)


def test_a_judge_that_takes_the_longer_is_found_out(server, config, known, tmp_path) -> None:
    def longer(body):
        _, answers = parts(body)
        if len(answers) == 1:
            return server.say("[[5]]")
        lengths = [len(answer) for answer in answers]
        return server.say("[[C]]" if lengths[0] == lengths[1] else "[[A]]" if lengths[0] > lengths[1] else "[[B]]")

    server.default = longer
    quality, _, _ = check_judge(config, known, tmp_path)
    assert quality["judge_length_bias"].value == 1
    assert quality["judge_accuracy_truncated"].value == 1


def test_self_preference_is_what_its_own_answers_get(server, config, known, answers, tmp_path) -> None:
    def vain(body):
        _, said = parts(body)
        if len(said) == 1:
            return server.say("[[5]]")
        return server.say("[[A]]" if said[0].startswith("ours") else "[[B]]" if said[1].startswith("ours") else "[[C]]")

    server.default = vain
    quality, _, _ = check_judge(config, known, tmp_path, own_answers=answers)
    assert quality["judge_self_preference"].value == 1
    assert quality["judge_accuracy"].value == 0.5


def test_one_model_under_two_seeds_gives_the_noise_floor(server, config, known, questions, answers, tmp_path) -> None:
    def judge(body):
        if body["messages"][1]["content"].startswith("pair"):
            return server.say("[[C]]")
        return server.say(f"[[{4 + len(parts(body)[1][0]) % 3}]]")

    server.default = judge
    other = [{**row, "choices": [{"index": 0, "turns": [f"{row['model_id']} longer", "x"]}]} for row in answers]
    config |= {"mode": "both"}
    quality, counts, _ = check_judge(config, known, tmp_path, same_model=(questions, answers, other))
    difference = quality["judge_aa_score_difference"]
    assert difference.n == 3
    assert difference.interval95[0] <= difference.value <= difference.interval95[1]
    assert quality["judge_aa_win_rate"].value == 0.5
    assert quality["judge_aa_win_rate_detectable"].value == 0
    assert counts["judgments"] == 27 + 12 + 6
