import logging
import threading
import time
import traceback
from email.utils import formatdate

import pytest

from llm_at_home.evaluation.judge.client import (
    JudgeClient,
    JudgeDenied,
    JudgeError,
    JudgeRejected,
    JudgeUnreachable,
)

KEY = "sk-proj-0123456789abcdef"
HELLO = [{"role": "user", "content": "hello"}]


def make(server, **options):
    """A client, and the list of pauses that it took instead of sleeping."""
    pauses: list[float] = []
    options = {"max_retries": 3, "timeout_s": 5, "sleep": pauses.append, "api_key": KEY} | options
    return JudgeClient("judge-1", server.base_url, **options), pauses


def test_a_reply_is_counted_and_the_request_is_the_published_one(server) -> None:
    client, _ = make(server, extra_body={"cache_prompt": False})
    reply = client.ask(HELLO, {"grammar": "root ::= [1-9]"})
    assert (reply.text, reply.finish_reason, reply.served_model) == (
        "Rating: [[7]]",
        "stop",
        "served-snapshot",
    )
    assert server.bodies == [
        {
            "messages": HELLO,
            "model": "judge-1",
            "temperature": 0.0,
            "max_tokens": 2048,
            "cache_prompt": False,
            "grammar": "root ::= [1-9]",
        }
    ]
    counts = client.counts
    assert (counts.calls, counts.retries, counts.failures) == (1, 0, 0)
    assert (counts.prompt_tokens, counts.completion_tokens) == (11, 3)


def test_fields_that_a_model_refuses_can_be_left_out(server) -> None:
    client, _ = make(server, temperature=None, max_tokens=None)
    client.ask(HELLO)
    assert set(server.bodies[0]) == {"messages", "model"}


@pytest.mark.parametrize("fault", ["429", "500", "503", "time-out", "drop", "truncated", "no completion", "no choices"])
def test_faults_that_pass_are_tried_again(server, fault) -> None:
    action = {
        "429": server.fail(429, {"error": {"message": "slow down"}}),
        "500": server.fail(500, {"error": {"message": "oops"}}),
        "503": server.fail(503, b"<html>busy</html>"),
        "time-out": server.hang(1.0),
        "drop": server.drop_mid_body(),
        "truncated": server.fail(200, b'{"id": "1", "choices": [{"ind'),
        "no completion": server.fail(200, b'"hello"'),
        "no choices": server.fail(200, {"id": "1", "object": "chat.completion", "choices": []}),
    }[fault]
    server.script = [action, action]
    client, pauses = make(server, timeout_s=0.2 if fault == "time-out" else 5)
    assert client.ask(HELLO).text == "Rating: [[7]]"
    assert (client.counts.calls, client.counts.retries, client.counts.failures) == (3, 2, 0)
    assert 0.5 <= pauses[0] <= 1.0 <= pauses[1] <= 2.0


def test_a_server_that_stays_broken_is_given_up_in_one_line(server) -> None:
    server.default = lambda body: server.fail(500, {"error": {"message": "still\nbroken"}})
    client, pauses = make(server)
    with pytest.raises(JudgeUnreachable, match="4 tries: HTTP 500: still broken") as caught:
        client.ask(HELLO)
    assert "\n" not in str(caught.value)
    assert (client.counts.calls, client.counts.retries, client.counts.failures) == (4, 3, 1)
    assert len(pauses) == 3


def test_a_server_that_is_not_there_is_given_up(server) -> None:
    client, _ = make(server, max_retries=1)
    server.close()
    with pytest.raises(JudgeUnreachable, match="connection failed"):
        client.ask(HELLO)
    assert client.counts.calls == 2


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [
        ({"retry_after": "7"}, 7, 7),
        ({"retry_after": "7", "retry_after_ms": "2500"}, 2.5, 2.5),
        ({"retry_after": "0"}, 0.5, 1.0),
        ({"retry_after": "soon"}, 0.5, 1.0),
    ],
)
def test_retry_after_is_honoured(server, said, least, most) -> None:
    server.script = [server.fail(429, None, **said)]
    client, pauses = make(server)
    client.ask(HELLO)
    assert least <= pauses[0] <= most


def test_retry_after_may_be_a_date(server) -> None:
    server.script = [server.fail(503, None, retry_after=formatdate(time.time() + 30, usegmt=True))]
    client, pauses = make(server)
    client.ask(HELLO)
    assert 25 <= pauses[0] <= 30


def test_retry_after_really_waits(server) -> None:
    server.script = [server.fail(429, None, retry_after="0.3")]
    client, _ = make(server, sleep=None, backoff_s=0.0)
    start = time.monotonic()
    client.ask(HELLO)
    assert time.monotonic() - start >= 0.3


def test_an_hour_s_pause_is_not_waited_for(server) -> None:
    server.script = [server.fail(429, None, retry_after="3600")]
    client, pauses = make(server)
    with pytest.raises(JudgeUnreachable, match="3600 s"):
        client.ask(HELLO)
    assert pauses == []


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, JudgeRejected), (422, JudgeRejected), (401, JudgeDenied), (403, JudgeDenied), (404, JudgeDenied)],
)
def test_faults_that_stay_are_not_tried_again(server, status, kind) -> None:
    server.script = [server.fail(status, {"error": {"message": "no such thing"}})]
    client, pauses = make(server)
    with pytest.raises(kind, match=f"HTTP {status}: no such thing"):
        client.ask(HELLO)
    assert (client.counts.calls, client.counts.failures, pauses) == (1, 1, [])


def test_a_used_up_quota_is_not_a_busy_server(server) -> None:
    server.script = [server.fail(429, {"error": {"message": "pay", "code": "insufficient_quota"}})]
    client, pauses = make(server)
    with pytest.raises(JudgeDenied, match="quota"):
        client.ask(HELLO)
    assert pauses == []


def test_the_key_is_sent_and_seen_nowhere_else(server, caplog, capfd) -> None:
    caplog.set_level(logging.DEBUG)
    echo = {"error": {"message": f"bad key {KEY} (sk-pro********cdef)"}}
    client, _ = make(server, max_retries=1)
    server.script = [server.fail(401, echo)]
    seen = [repr(client), str(client.counts)]
    for script in ([server.fail(401, echo)], [server.fail(400, echo)], [server.fail(500, echo)] * 2):
        server.script = list(script)
        with pytest.raises(JudgeError) as caught:
            client.ask(HELLO)
        seen += [str(caught.value), repr(caught.value), "".join(traceback.format_exception(caught.value))]
    server.script = [server.say(f"your key is {KEY} [[3]]")]
    reply = client.ask(HELLO)
    assert reply.text == "your key is [key] [[3]]"
    seen += [repr(reply), caplog.text, *capfd.readouterr()]
    assert server.headers[-1]["authorization"] == f"Bearer {KEY}"
    assert len(caplog.records) > 0
    for text in seen:
        assert KEY not in text
        assert "sk-pro" not in text


def test_a_placeholder_key_garbles_no_reply(server) -> None:
    server.script = [server.say("none of it; a task-based sk-learn answer [[2]]")]
    client, _ = make(server, api_key="none")
    assert client.ask(HELLO).text == "none of it; a task-based sk-learn answer [[2]]"


def test_a_proxy_from_the_environment_gets_no_loopback_request(server, monkeypatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    client, _ = make(server, max_retries=0)
    assert client.ask(HELLO).text == "Rating: [[7]]"


def test_stopping_ends_a_pause(server) -> None:
    server.script = [server.fail(429, None, retry_after="60")]
    client, _ = make(server, sleep=None)
    threading.Timer(0.3, client.stop).start()
    start = time.monotonic()
    with pytest.raises(JudgeUnreachable, match="stopped"):
        client.ask(HELLO)
    assert time.monotonic() - start < 10
    assert client.counts.calls == 1
