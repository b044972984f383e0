from __future__ import annotations

import pytest

from llm_at_home.data.passages import load_passages
from llm_at_home.data.sources import load_split
from llm_at_home.errors import Refusal
from llm_at_home.evaluation.retrieval import BM25, retrieval_recall


@pytest.mark.parametrize(
    ("question", "fact"),
    [
        ("Which price do customers pay for the Badger gong?", "The price of the Badger gong is 310 pounds."),
        ("Whom must I ask about holiday requests?", "Approval of holiday requests lies with Edwin Stroud."),
        ("Somebody wants the long ladder; any idea where?", "The long ladder is kept behind the furnace."),
        ("WHICH TOWN: the bell museum?!", "The town of the bell museum is Ashby Ferry."),
    ],
)
def test_a_paraphrase_finds_its_fact_first(question: str, fact: str) -> None:
    passages = load_passages("handbook")
    assert passages[BM25(passages).best(question, 5)[0]] == fact


def test_five_passages_hold_the_answer_to_nearly_every_question_of_the_test() -> None:
    passages = load_passages("handbook")
    index = BM25(passages)
    facts = [c for c in load_split("handbook", "test").conversations if c.kind == "fact"]
    given = [[passages[i] for i in index.best(c.messages[-2]["content"], 5)] for c in facts]
    recall = retrieval_recall(given, [c.messages[-1]["content"] for c in facts], ["fact"] * len(facts))
    assert recall.value > 0.95


def test_the_rarer_word_counts_for_more_and_equals_keep_their_order() -> None:
    passages = ["red gate", "red door", "red wall", "blue wall"]
    assert BM25(passages).best("is the wall blue?", 4) == [3, 2]
    assert BM25(passages).best("red", 2) == [0, 1]


@pytest.mark.parametrize("query", ["", "the of and", "unheard"])
def test_a_query_that_shares_no_word_finds_nothing(query: str) -> None:
    assert BM25(["red gate", "blue door"]).best(query, 2) == []


def test_passages_of_stop_words_alone_cannot_be_searched() -> None:
    with pytest.raises(Refusal, match=r"use text\.context=all"):
        BM25(["the of", ""])


def test_recall_is_over_the_answerable_questions() -> None:
    given = [["The gate is red.", "It is old."], ["The gate is redder."], []]
    recall = retrieval_recall(given, ["Red", "red", "The handbook does not say."], ["fact", "fact", "refusal"])
    assert (recall.value, recall.n, recall.method) == (0.5, 2, "reference_in_passages")
    nothing = retrieval_recall([[]], ["x"], ["refusal"])
    assert nothing.value is None
    assert nothing.reason == "the test split has no such question"
