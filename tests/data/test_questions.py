import json
from collections import Counter

import pytest

from llm_at_home.data.questions import CATEGORIES, load_questions, questions_hash
from llm_at_home.errors import Refusal


def question(number, **changes):
    return {"question_id": number, "category": "math", "turns": ["1 + 1?", "And doubled?"], **changes}


@pytest.fixture
def write(tmp_path):
    def _write(*rows):
        path = tmp_path / "own.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return path

    return _write


def test_home_bench_covers_every_category_with_references():
    questions = load_questions("home_bench")
    assert 24 <= len(questions) <= 32
    counts = Counter(q.category for q in questions)
    assert set(counts) == set(CATEGORIES)
    assert min(counts.values()) >= 3
    assert [q.question_id for q in questions] == list(range(1001, 1001 + len(questions)))
    assert all(q.reference and all(answer.strip() for answer in q.reference) for q in questions)


def _run(code):
    names: dict = {}
    exec(code[code.index("def ") :], names)
    return next(value for name, value in names.items() if name != "__builtins__")


def test_the_coding_references_of_home_bench_are_right():
    vowels, second, program, average = (q for q in load_questions("home_bench") if q.category == "coding")
    assert _run(vowels.reference[0])("Banana E") == 4
    assert _run(vowels.reference[1])("Banana E") == {"a": 3, "e": 1, "i": 0, "o": 0, "u": 0}
    for answer in second.reference:
        find = _run(answer)
        assert [find(x) for x in ([], [3, 3], [1, 2], [-1, -5, -1, -3], [5, 4, 5])] == [None, None, 1, -3, 4]
    printed = []
    exec(program.turns[0].split("\n\n", 1)[1], {"print": printed.append})
    assert printed == [20]
    assert eval(program.reference[1], {"values": [1, 2, 3, 4]}) == 20
    assert [_run(average.reference[0])(x) for x in ([], [1, 2])] == [0.0, 1.5]
    assert [_run(average.reference[1])(x) for x in ([], [None], [1, None, 2])] == [0.0, 0.0, 1.5]


def test_ids_choose_and_order_and_limit_takes_the_first():
    assert [q.question_id for q in load_questions("home_bench", ids=[1005, 1002])] == [1005, 1002]
    assert [q.question_id for q in load_questions("home_bench", ids=[1005, 1002], limit=1)] == [1005]
    assert [q.question_id for q in load_questions("home_bench", limit=2)] == [1001, 1002]


def test_an_own_file_may_leave_references_out(write):
    path = write(
        question(1),
        question(2, reference=["2", "4"]),
        question(3, reference=["2"]),
        question(4, reference=[""]),
    )
    assert [q.reference for q in load_questions("path", path=path)] == [None, ["2", "4"], ["2", ""], None]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "no JSON object"),
        (question("81"), "question_id is no whole number"),
        (question(True), "question_id is no whole number"),
        (question(2, category=None), "category is no string"),
        (question(2, turns=["one"]), "turns is no list of 2"),
        (question(2, turns="ab"), "turns is no list of 2"),
        (question(2, turns=["one", ""]), "turns 2 is empty"),
        (question(2, reference="4"), "reference is no list"),
        (question(2, reference=["2", 4]), "reference is no list of up to 2 strings"),
        (question(1), "question_id 1 was there before"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(write, row, reason):
    with pytest.raises(Refusal, match="bad lines: line 2: ") as refusal:
        load_questions("path", path=write(question(1), row))
    assert reason in str(refusal.value)


def test_an_unknown_choice_is_refused(write):
    with pytest.raises(Refusal, match="choose one of home_bench, mt_bench, path"):
        load_questions("vicuna")
    with pytest.raises(Refusal, match=r"questions\.path="):
        load_questions("path")
    with pytest.raises(Refusal, match="no question 7"):
        load_questions("home_bench", ids=[1001, 7])
    with pytest.raises(Refusal, match="limit=0"):
        load_questions("home_bench", limit=0)
    with pytest.raises(Refusal, match="holds no question"):
        load_questions("path", path=write(""))


def test_the_hash_follows_the_file(write):
    before = questions_hash("path", path=write(question(1)))
    assert questions_hash("path", path=write(question(2))) != before
