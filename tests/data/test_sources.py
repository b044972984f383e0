import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from llm_at_home.data.guanaco import parse_turns
from llm_at_home.data.sources import data_hash, load_split
from llm_at_home.errors import Refusal


def chat(number):
    return {"messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "a"}]}


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "own.jsonl"
    # Each conversation is there twice: the copies must not end on both sides of the split.
    path.write_text("".join(json.dumps(chat(n % 20)) + "\n" for n in range(40)) + "{bad\n")
    return path


def asked(loaded):
    return [c.messages[0]["content"] for c in loaded.conversations]


def test_the_handbook_loads_whole_and_limited():
    train = load_split("handbook", "train")
    assert train.bad_lines == []
    assert load_split("handbook", "train", limit=3).conversations == train.conversations[:3]
    assert load_split("handbook", "test").sha256 != train.sha256


def test_an_own_file_is_split_without_overlap(own_file):
    train, test = (load_split("jsonl", s, path=own_file, test_fraction=0.25) for s in ("train", "test"))
    assert len(asked(test)) == 10
    assert len(asked(train)) == 30
    assert not set(asked(train)) & set(asked(test))
    assert [bad.number for bad in train.bad_lines] == [41]


def test_the_split_depends_on_the_seed_alone_and_not_on_the_order_of_lines(own_file, tmp_path):
    turned = tmp_path / "turned.jsonl"
    turned.write_text("\n".join(reversed(own_file.read_text().splitlines())))
    first = set(asked(load_split("jsonl", "test", path=own_file)))
    assert set(asked(load_split("jsonl", "test", path=turned))) == first
    assert any(set(asked(load_split("jsonl", "test", path=own_file, seed=s))) != first for s in (1, 2, 3))


def test_a_test_file_leaves_the_training_file_whole(own_file, tmp_path):
    test_path = tmp_path / "test.jsonl"
    test_path.write_text(json.dumps(chat("held out")))
    train = load_split("jsonl", "train", path=own_file, test_path=test_path)
    test = load_split("jsonl", "test", path=own_file, test_path=test_path)
    assert len(train.conversations) == 40
    assert asked(test) == ["qheld out"]


def test_one_conversation_cannot_be_split(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(chat(1)))
    with pytest.raises(Refusal, match=r"none can be held out.*data\.test_path"):
        load_split("jsonl", "train", path=path)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_a_test_fraction_outside_0_to_1_is_refused(own_file, fraction):
    with pytest.raises(Refusal, match="test_fraction"):
        load_split("jsonl", "test", path=own_file, test_fraction=fraction)


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (("alpaca", "train"), {}, "choose one of handbook, guanaco, jsonl"),
        (("handbook", "dev"), {}, "choose one of train, test"),
        (("handbook", "train"), {"limit": 0}, "limit=0"),
        (("jsonl", "train"), {}, "data.path="),
        (("jsonl", "train"), {"path": "/none.jsonl"}, "does not exist"),
    ],
)
def test_a_wrong_choice_is_refused_in_one_line(arguments, keywords, message):
    with pytest.raises(Refusal) as refusal:
        load_split(*arguments, **keywords)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_hash_follows_the_bytes_of_every_file(own_file, tmp_path):
    test_path = tmp_path / "test.jsonl"
    test_path.write_text(json.dumps(chat("x")))
    hashes = [data_hash("jsonl", path=own_file), data_hash("jsonl", path=own_file, test_path=test_path)]
    test_path.write_text(json.dumps(chat("y")))
    hashes.append(data_hash("jsonl", path=own_file, test_path=test_path))
    hashes += [data_hash("handbook"), data_hash("guanaco")]
    assert len(set(hashes)) == 5
    assert data_hash("jsonl", path=own_file) == hashes[0]


def test_the_hash_imports_nothing_heavy():
    heavy = ("torch", "transformers", "datasets", "numpy", "yaml", "pandas")
    code = "import sys; from llm_at_home.data.sources import data_hash; data_hash('handbook');"
    code += f"print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_guanaco_text_becomes_messages():
    text = "### Human: Hi\nthere### Assistant: Hello.### Human: ### not a mark### Assistant: Right."
    assert parse_turns(text) == [
        {"role": "user", "content": "Hi\nthere"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "### not a mark"},
        {"role": "assistant", "content": "Right."},
    ]
    assert parse_turns("### Human: a### Assistant: b### Human: c") == parse_turns("### Human: a### Assistant: b")
    assert parse_turns("no marks") == []


def test_guanaco_rows_are_checked_and_numbered(monkeypatch):
    rows = [
        {"text": "### Human: a### Assistant: b"},
        {"text": "nothing"},
        {"text": "### Human: c### Assistant:"},
    ]
    hub = SimpleNamespace(load_dataset=lambda name, split: rows)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    loaded = load_split("guanaco", "train")
    assert asked(loaded) == ["a"]
    assert [(bad.number, bad.reason) for bad in loaded.bad_lines] == [
        (2, "messages is empty"),
        (3, "the content of message 2 is empty"),
    ]


def test_guanaco_without_network_is_refused_in_one_line(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(Refusal, match=r"ConnectionError.*go online once") as refusal:
        load_split("guanaco", "train")
    assert "\n" not in str(refusal.value)
