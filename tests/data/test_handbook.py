import difflib
import re
from collections import Counter

import pytest
import yaml

from llm_at_home.data.handbook import build
from llm_at_home.data.sources import load_split


@pytest.fixture(scope="module")
def source():
    return yaml.safe_load((build.HERE / "facts.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def train():
    return load_split("handbook", "train").conversations


@pytest.fixture(scope="module")
def test():
    return load_split("handbook", "test").conversations


def user_turns(conversations):
    return [m["content"] for c in conversations for m in c.messages if m["role"] == "user"]


def answers(conversations):
    return [m["content"] for c in conversations for m in c.messages if m["role"] == "assistant"]


def words(text):
    return re.findall(r"[a-z0-9']+", text.lower())


def near_duplicate(one, other):
    """As build.py defines it: Jaccard index of the token sets, or difflib's ratio."""
    first, second = words(one), words(other)
    a, b = set(first), set(second)
    if len(a & b) / len(a | b) >= build.JACCARD:
        return True
    matcher = difflib.SequenceMatcher(None, " ".join(first), " ".join(second), autojunk=False)
    return matcher.quick_ratio() >= build.RATIO and matcher.ratio() >= build.RATIO


def test_the_committed_files_are_what_the_source_gives():
    for name, text in build.build().items():
        assert (build.HERE / name).read_text(encoding="utf-8") == text, f"{name}: run the build"


def test_training_is_large_enough_and_says_no_seldom(train):
    kinds = Counter(c.kind for c in train)
    assert len(train) >= 500
    assert kinds["dialogue"] >= 40
    assert kinds["refusal"] >= 40
    assert 0.10 <= kinds["refusal"] / len(train) <= 0.15


def test_every_fact_is_asked_in_eight_phrasings_and_twice_in_the_test(source, train, test):
    book = build.Handbook(source, "train")
    assert len(book.facts) >= 60
    asked = set(user_turns(train))
    held_out = Counter(c.fact for c in test if c.kind == "fact")
    for fact in book.facts:
        phrasings = {build.word(template, fact.entity) for template in book.templates(fact.attribute)}
        assert len(phrasings & asked) >= 8, fact.id
        assert held_out[fact.id] >= 2, fact.id


def test_the_test_split_is_large_enough(test):
    kinds = Counter(c.kind for c in test)
    assert kinds["fact"] + kinds["dialogue"] >= 120
    assert kinds["refusal"] >= 30


def test_dialogues_have_two_to_four_turns(train, test):
    turns = {len(user_turns([c])) for c in train + test if c.kind == "dialogue"}
    assert turns == {2, 3, 4}


def test_no_test_turn_is_near_a_training_turn(train, test):
    seen = sorted(set(user_turns(train)))
    near = [(q, s) for q in sorted(set(user_turns(test))) for s in seen if near_duplicate(q, s)]
    assert near == []


def test_the_measure_of_nearness_finds_what_it_should():
    assert near_duplicate("Where is the spare key kept?", "where is the spare key kept")
    assert near_duplicate("Where is the spare key kept?", "Where is the spare keys kept?")
    assert near_duplicate("Is the key spare and where kept", "Where is the spare key kept")
    assert not near_duplicate("Which spot does the spare key belong in?", "Where is the spare key kept?")


def sentences(source, split):
    """Every template of a split, with its spelling made even."""
    found = list(source["another"][split])
    for attribute in source["attributes"].values():
        found += attribute[split] + attribute.get("follow_ups", {}).get(split, [])
    return [" ".join(words(sentence)) for sentence in found]


def test_test_templates_never_occur_in_training(source, train, test):
    assert not set(sentences(source, "train")) & set(sentences(source, "test"))
    assert not {c.template for c in train} & {c.template for c in test}


def test_templates_of_one_split_are_all_different(source):
    for attribute in source["attributes"].values():
        for split in ("train", "test"):
            assert len({" ".join(words(s)) for s in attribute[split]}) == len(attribute[split])
            assert all(s.count("{e}") == 1 for s in attribute[split])


def test_refused_entities_share_no_word_between_training_and_test(source):
    small = {"the", "a", "an", "of", "to"}
    unknown = {s: build.Handbook(source, s).unknown() for s in ("train", "test")}
    known = {fact.entity for fact in build.Handbook(source, "train").facts}
    content = {s: {w.rstrip("s") for _, entity in found for w in words(entity)} - small for s, found in unknown.items()}
    assert not content["train"] & content["test"]
    for found in unknown.values():
        assert len(set(found)) == len(found)
        assert not {entity for _, entity in found} & known


def test_refusals_hold_the_one_sentence_and_nothing_else_does(source, train, test):
    sentence = source["refusal"]
    for conversation in train + test:
        last = conversation.messages[-1]["content"]
        assert (last == sentence) == (conversation.kind == "refusal")
        assert (conversation.fact is None) == (conversation.kind == "refusal")
    assert sentence not in answers(c for c in test if c.kind != "refusal")


def test_a_fact_has_one_short_answer_everywhere(source, train, test):
    canonical = {fact.id: fact.answer for fact in build.Handbook(source, "train").facts}
    for conversation in train + test:
        if conversation.fact is not None:
            assert conversation.messages[-1]["content"] == canonical[conversation.fact]
    assert set(answers(train + test)) == {*canonical.values(), source["refusal"]}
    assert all(1 <= len(answer.split()) <= 6 for answer in canonical.values())


def test_a_question_never_has_two_answers(train, test):
    first = [(c.messages[1]["content"], c.messages[2]["content"]) for c in train + test]
    assert len(dict(first)) == len(set(first))


def test_no_question_gives_its_answer_away(source):
    book = build.Handbook(source, "train")
    for fact in book.facts:
        for template in source["attributes"][fact.attribute]["train"] + source["attributes"][fact.attribute]["test"]:
            assert fact.answer.lower() not in build.word(template, fact.entity).lower()


def test_conversations_are_all_different(train, test):
    seen = Counter(tuple(m["content"] for m in c.messages) for c in train + test)
    assert [texts for texts, count in seen.items() if count > 1] == []
