import json

import pytest

from llm_at_home.data.conversations import read_jsonl
from llm_at_home.errors import Refusal

USER = {"role": "user", "content": "Which day?"}
ASSISTANT = {"role": "assistant", "content": "Friday"}
SYSTEM = {"role": "system", "content": "Be short."}
GOOD = {"messages": [USER, ASSISTANT]}


@pytest.fixture
def write(tmp_path):
    def _write(*lines):
        path = tmp_path / "chats.jsonl"
        rows = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"\n".join(rows))
        return path

    return _write


def test_reads_messages_and_names_a_conversation_by_its_line(write):
    conversations, bad = read_jsonl(write({"messages": [SYSTEM, USER, ASSISTANT], "extra": 1}, b"", GOOD))
    assert bad == []
    assert [c.id for c in conversations] == ["chats-1", "chats-3"]
    assert conversations[0].messages == [SYSTEM, USER, ASSISTANT]
    assert (conversations[0].kind, conversations[0].fact, conversations[0].template) == ("chat", None, None)


def test_keeps_what_a_line_says_of_itself(write):
    row = {**GOOD, "id": 7, "kind": "fact", "fact": "day", "template": "Which {e}?"}
    (conversation,), _ = read_jsonl(write(row))
    assert (conversation.id, conversation.kind) == ("7", "fact")
    assert (conversation.fact, conversation.template) == ("day", "Which {e}?")


def test_leaves_out_keys_of_a_message_that_no_template_reads(write):
    (conversation,), _ = read_jsonl(write({"messages": [{**USER, "name": "Ann"}, {**ASSISTANT, "weight": 1}]}))
    assert conversation.messages == [USER, ASSISTANT]


def test_takes_a_byte_order_mark_windows_line_ends_and_separators_inside_strings(tmp_path):
    path = tmp_path / "windows.jsonl"
    text = '{"messages": [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c"}]}'
    path.write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n\r\n{text}\r\n".encode())
    conversations, bad = read_jsonl(path)
    assert bad == []
    assert [c.messages[0]["content"] for c in conversations] == ["a\u2028b", "a\u2028b"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{broken", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b'"text"', "no JSON object"),
        ([GOOD], "JSON array"),
        ({"prompt": "x"}, "no messages"),
        ({"messages": "x"}, "messages is no list"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["x"]}, "message 1 is no object"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "message 2 has the unknown role 'tool'"),
        ({"messages": [USER, {"role": ["x"], "content": "x"}]}, "message 2 has the unknown role"),
        ({"messages": [USER, {"role": "assistant"}]}, "content of message 2 is no string"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "content of message 2 is no string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}, ASSISTANT]},
            "message 1 is no string",
        ),
        ({"messages": [{"role": "user", "content": " \n"}, ASSISTANT]}, "content of message 1 is empty"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a surrogate pair"),
        ({"messages": [USER]}, "no message is from the assistant"),
        ({"messages": [SYSTEM]}, "no message is from the assistant"),
        ({"messages": [USER, ASSISTANT, USER]}, "the last message is not from the assistant"),
        ({"messages": [USER, SYSTEM, ASSISTANT]}, "message 2 is a system message; only the first"),
        ({"messages": [SYSTEM, SYSTEM, USER, ASSISTANT]}, "message 2 is a system message; only the first"),
        ({"messages": [ASSISTANT]}, "message 1 is the assistant's and should be the user's"),
        ({"messages": [SYSTEM, ASSISTANT]}, "message 2 is the assistant's and should be the user's"),
        ({"messages": [USER, USER, ASSISTANT]}, "message 2 is the user's and should be the assistant's"),
        ({"messages": [USER, ASSISTANT, ASSISTANT]}, "message 3 is the assistant's and should be the user's"),
        ({**GOOD, "kind": 3}, "kind is no string"),
        ({**GOOD, "id": [1]}, "id is neither"),
    ],
)
def test_reports_a_bad_line_with_its_number_and_reason(write, line, reason):
    conversations, bad = read_jsonl(write(GOOD, line, GOOD))
    assert [c.id for c in conversations] == ["chats-1", "chats-3"]
    assert [b.number for b in bad] == [2]
    assert reason in bad[0].reason
    assert str(bad[0]).startswith("line 2: ")


def test_reports_an_id_that_was_used_before(write):
    conversations, bad = read_jsonl(write({**GOOD, "id": "a"}, {**GOOD, "id": "a"}))
    assert len(conversations) == 1
    assert bad[0].reason == "the id 'a' is that of line 1"


def test_refuses_a_file_without_one_usable_line(write):
    with pytest.raises(Refusal) as refusal:
        read_jsonl(write(*[b"{"] * 5))
    message = str(refusal.value)
    assert "no usable conversation: line 1: not JSON" in message
    assert message.endswith("and 2 more")
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"\n\r\n", b"\xef\xbb\xbf"])
def test_refuses_an_empty_file(write, content):
    with pytest.raises(Refusal, match="it is empty"):
        read_jsonl(write(content))


def test_refuses_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(Refusal, match="does not exist"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(Refusal, match="is a folder"):
        read_jsonl(tmp_path)
