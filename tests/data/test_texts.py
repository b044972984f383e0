import json
import re
import unicodedata

import pytest

from llm_at_home.data import texts
from llm_at_home.data.questions import load_questions
from llm_at_home.data.texts import NAMES, load_texts, texts_file, texts_hash
from llm_at_home.errors import Refusal

COUNTS = {"held_out": 40, "calibration": 48}
# Two passages are near-duplicates when they share a run of SHINGLE words, case and punctuation aside.
SHINGLE = 8
# A sentence of fewer words ("Yes.", "return result") belongs to nobody.
SENTENCE = 3


def rows(name):
    return [json.loads(line) for line in texts_file(name).read_text(encoding="utf-8").splitlines()]


def words(text):
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower())


def sentences(text):
    parts = (tuple(words(part)) for part in re.split(r"[.!?;\n]+", text))
    return {part for part in parts if len(part) >= SENTENCE}


def shingles(text):
    tokens = words(text)
    return {tuple(tokens[start : start + SHINGLE]) for start in range(len(tokens) - SHINGLE + 1)}


def passages():
    return {row["id"]: row["text"] for name in NAMES for row in rows(name)}


def home_bench():
    return {
        f"{question.question_id}-{kind}-{turn}": text
        for question in load_questions("home_bench")
        for kind, part in (("turn", question.turns), ("reference", question.reference or []))
        for turn, text in enumerate(part)
    }


def shared(parts_of, groups):
    """What two groups of texts have in common, with the names of the two texts; within a group nothing is compared."""
    seen, found = {}, []
    for number, group in enumerate(groups):
        for name, text in group.items():
            for part in parts_of(text):
                first = seen.setdefault(part, (number, name))
                if first[0] != number:
                    found.append((first[1], name, " ".join(part)))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_as_many_as_promised_and_numbered_in_order(name):
    read = rows(name)
    assert [row["id"] for row in read] == [f"{name[0]}{number:02d}" for number in range(1, COUNTS[name] + 1)]
    assert all(set(row) == {"id", "register", "text"} and row["register"] for row in read)
    assert load_texts(name) == [row["text"] for row in read]


def test_each_passage_has_110_to_180_words():
    lengths = {key: len(text.split()) for key, text in passages().items()}
    assert {key: length for key, length in lengths.items() if not 110 <= length <= 180} == {}


def test_registers_vary_and_code_is_a_small_share():
    for name in NAMES:
        read = rows(name)
        assert len({row["register"] for row in read}) >= 25
        assert 1 <= sum("```" in row["text"] for row in read) <= len(read) / 10


def test_plain_text_without_odd_characters():
    for key, text in passages().items():
        assert text == text.strip() == unicodedata.normalize("NFC", text), key
        odd = {c for c in text if c != "\n" and (unicodedata.category(c)[0] == "C" or (c.isspace() and c != " "))}
        assert not odd, key


def test_the_two_files_and_home_bench_share_no_sentence():
    groups = [{row["id"]: row["text"] for row in rows(name)} for name in NAMES]
    assert shared(sentences, [*groups, home_bench()]) == []


def test_no_passage_is_a_near_duplicate_of_another_or_of_a_question():
    alone = [{key: text} for key, text in passages().items()]
    assert shared(shingles, [*alone, home_bench()]) == []


def test_the_measures_find_what_they_look_for():
    text = "One two three four. Five six seven eight nine!"
    assert shared(sentences, [{"a": text}, {"b": "Zero; ONE, two three four?"}]) == [("a", "b", "one two three four")]
    assert len(shared(shingles, [{"a": text}, {"b": text.upper()}])) == 2
    assert shared(shingles, [{"a": text}, {"b": "one two three four five six seven, nine"}]) == []


def test_a_limit_takes_the_first():
    assert load_texts("held_out", 3) == load_texts("held_out")[:3]
    assert len(load_texts("held_out", 1000)) == COUNTS["held_out"]
    with pytest.raises(Refusal, match="at least 1"):
        load_texts("held_out", 0)


def test_the_hash_belongs_to_the_content(tmp_path, monkeypatch):
    before = {name: texts_hash(name) for name in NAMES}
    assert len(set(before.values())) == len(NAMES)
    content = texts_file("held_out").read_bytes()
    monkeypatch.setattr(texts, "HERE", tmp_path)
    (tmp_path / "held_out.jsonl").write_bytes(content)
    assert texts_hash("held_out") == before["held_out"]
    (tmp_path / "held_out.jsonl").write_bytes(content + b"\n")
    assert texts_hash("held_out") != before["held_out"]


@pytest.mark.parametrize("call", [load_texts, texts_hash])
def test_refuses_other_names(call):
    with pytest.raises(Refusal, match="choose one of held_out, calibration"):
        call("../home_bench/question")


def test_refuses_a_damaged_file(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "HERE", tmp_path)
    (tmp_path / "held_out.jsonl").write_text('{"text": "fine"}\n["text"]\n{"text": " "}\n{broken', encoding="utf-8")
    with pytest.raises(Refusal, match=r"line 2: its text is no string; line 3: its text is empty; line 4: not JSON"):
        load_texts("held_out")
