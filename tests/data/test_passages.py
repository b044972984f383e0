from __future__ import annotations

import pytest

from llm_at_home.data.handbook.build import Handbook, read_source
from llm_at_home.data.passages import load_passages, passages_hash
from llm_at_home.errors import Refusal


def test_the_handbook_s_passages_are_its_facts_word_for_word() -> None:
    facts = Handbook(read_source(), "test").facts
    passages = load_passages("handbook")
    assert len(passages) == len(facts) == len(set(passages))
    for fact, passage in zip(facts, passages, strict=True):
        assert fact.answer in passage
        assert fact.entity.lower() in passage.lower()
        assert passage[0].isupper()
        assert "{" not in passage


def test_no_passage_holds_what_the_handbook_does_not() -> None:
    book = Handbook(read_source(), "test")
    unknown = [entity for _, entity in book.unknown()]
    assert not [entity for entity in unknown if any(entity in passage for passage in book.statements())]


def test_a_file_is_read_a_passage_a_line(tmp_path) -> None:
    file = tmp_path / "passages.txt"
    file.write_bytes(b"\xef\xbb\xbfThe gate is red.\r\n\n  The door is blue.  \n")
    assert load_passages("jsonl", file) == ["The gate is red.", "The door is blue."]
    assert load_passages("handbook", file) == load_passages("jsonl", file), "the file stands in for the data set's own"


def test_the_hash_is_over_what_the_file_says(tmp_path) -> None:
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("a b\n\nc\n")
    other.write_text("a b\nc")
    assert passages_hash("jsonl", one) == passages_hash("jsonl", other)
    other.write_text("a bc\n")
    assert passages_hash("jsonl", one) != passages_hash("jsonl", other)


@pytest.mark.parametrize(
    ("content", "why"), [(b" \n\n", "holds no passage"), (b"\xff\xfe\x00", "no UTF-8 text"), (None, "does not exist")]
)
def test_a_file_without_passages_is_refused(content, why, tmp_path) -> None:
    file = tmp_path / "passages.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(Refusal, match=why):
        load_passages("handbook", file)


def test_a_data_set_without_passages_wants_a_file() -> None:
    with pytest.raises(Refusal, match=r"data=guanaco brings no passages: give text\.context_path=FILE"):
        load_passages("guanaco")
