"""What judging costs, and what keeps it from costing more: cache, budget, limits on the rate, batches, estimates."""

import json
import threading
import time
from types import SimpleNamespace

import pytest

from llm_at_home.errors import Refusal
from llm_at_home.evaluation.judge import estimate_run, judge_run
from llm_at_home.evaluation.judge.batch import PENDING
from llm_at_home.evaluation.judge.budget import Budget, OverBudget
from llm_at_home.evaluation.judge.client import JudgeClient, JudgeDenied, JudgeOverBudget, JudgeUnreachable
from llm_at_home.evaluation.judge.limits import RateLimit
from llm_at_home.records.jsonl import read_jsonl

PRICES = {"input": 30.0, "output": 60.0, "source": "a list", "batch_share": 0.5}


def test_a_judgment_is_never_paid_for_twice(server, config, questions, answers, tmp_path) -> None:
    config |= {"cache": True}
    first, _, _ = judge_run(config, questions, answers, None, tmp_path / "a")
    again, counts, _ = judge_run(config, questions, answers, None, tmp_path / "b")
    assert again == first
    assert (counts["judge_calls"], counts["judgments"], len(server.bodies)) == (0, 6, 6)
    assert {row["asked"] for row in read_jsonl(tmp_path / "b" / "judgments.jsonl")} == {0}


@pytest.mark.parametrize(
    "change", [{"model": "judge-snapshot-2"}, {"temperature": 1}, {"max_tokens": 65}, {"repeats": 2}]
)
def test_another_judge_parameter_or_repeat_is_asked(server, config, questions, answers, tmp_path, change) -> None:
    config |= {"cache": True}
    judge_run(config, questions, answers, None, tmp_path / "a")
    _, counts, _ = judge_run(config | change, questions, answers, None, tmp_path / "b")
    assert counts["judge_calls"] == 6


def test_a_reply_that_could_not_be_read_is_not_kept(server, config, questions, answers, tmp_path) -> None:
    config |= {"cache": True, "concurrency": 1}
    server.script = [server.say("Lovely!"), server.say("Lovely!")]
    _, counts, _ = judge_run(config, questions[:1], answers, None, tmp_path / "a")
    assert counts["judgments_missing"] == 1
    _, counts, _ = judge_run(config, questions[:1], answers, None, tmp_path / "b")
    assert (counts["judge_calls"], counts["judgments_missing"]) == (1, 0)


def test_the_cost_is_that_of_the_tokens_used(config, questions, answers, tmp_path) -> None:
    _, counts, costs = judge_run(config | {"prices": PRICES}, questions, answers, None, tmp_path)
    assert counts["judge_prompt_tokens"] == 66
    assert costs["judge_cost"].value == pytest.approx((66 * 30 + 18 * 60) / 1e6)
    assert costs["judge_cost"].method == "usage at list price (a list)"


def test_without_prices_the_cost_is_unknown_and_no_zero(config, questions, answers, tmp_path) -> None:
    _, _, costs = judge_run(config, questions, answers, None, tmp_path)
    assert costs["judge_cost"].value is None
    assert "judge.prices.input" in costs["judge_cost"].reason


def test_a_run_stops_before_it_could_exceed_its_budget_and_goes_on_with_more(
    server, config, questions, answers, tmp_path
) -> None:
    # One request costs 0.0005 USD and could cost 0.0045, its prompt and the longest reply.
    config |= {"prices": PRICES, "max_cost_usd": 0.0055, "concurrency": 1, "cache": True}
    with pytest.raises(JudgeOverBudget, match="max_cost_usd") as caught:
        judge_run(config, questions, answers, None, tmp_path)
    spent = caught.value.costs["judge_cost"].value
    assert 0 < spent <= config["max_cost_usd"]
    asked = len(server.bodies)
    assert caught.value.counts["judge_calls"] == asked
    assert 1 <= asked < 6
    _, counts, _ = judge_run(config | {"max_cost_usd": 1.0}, questions, answers, None, tmp_path)
    assert (counts["judge_calls"], counts["judgments"]) == (6 - asked, 6)


def test_prompts_that_alone_exceed_the_budget_are_not_sent(server, config, questions, answers, tmp_path) -> None:
    with pytest.raises(Refusal, match="prompts alone"):
        judge_run(config | {"prices": PRICES, "max_cost_usd": 0.0001}, questions, answers, None, tmp_path)
    assert server.bodies == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_cost_usd": 1.0}, "judge.prices"),
        ({"max_cost_usd": 1.0, "prices": PRICES, "max_tokens": None}, "judge.max_tokens"),
        ({"repeats": 0}, "judge.repeats"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"rating": "loud"}, "judge.rating"),
        ({"rating": "expected", "batch": True}, "judge.batch"),
    ],
)
def test_what_no_budget_or_batch_can_hold_is_refused(config, questions, answers, tmp_path, change, says) -> None:
    with pytest.raises(Refusal, match=says):
        judge_run(config | change, questions, answers, None, tmp_path)


def test_a_request_that_may_have_been_billed_counts_as_spent() -> None:
    budget = Budget(PRICES, max_usd=0.01)
    budget.release(budget.reserve(100, 100), billed=True)
    assert budget.spent == pytest.approx(0.009)
    with pytest.raises(OverBudget):
        budget.reserve(100, 100)
    assert "1 requests without a reply" in budget.reading().method


def test_a_dry_run_counts_and_prices_what_is_not_kept_and_asks_nothing(
    server, config, questions, answers, baseline, tmp_path
) -> None:
    config |= {"prices": PRICES, "cache": True, "mode": "both"}
    before = estimate_run(config, questions, answers, baseline)
    assert (before.judgments, before.calls, before.cached, before.most_reply_tokens) == (12, 18, 0, 18 * 64)
    assert server.bodies == []
    assert before.least_usd == pytest.approx(before.prompt_tokens * 30 / 1e6)
    assert before.most_usd == pytest.approx(before.least_usd + 18 * 64 * 60 / 1e6)
    judge_run(config | {"mode": "single"}, questions, answers, None, tmp_path)
    after = estimate_run(config, questions, answers, baseline)
    assert (after.calls, after.cached) == (12, 6)
    assert "unknown" in estimate_run(config | {"prices": None}, questions, answers, baseline).as_text()


def test_no_more_requests_or_tokens_a_minute_than_allowed() -> None:
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    limit = RateLimit(2, None, clock=lambda: now[0])
    for _ in range(5):
        limit.wait(1, sleep)
    assert slept == [60, 60]
    slept.clear()
    limit = RateLimit(None, 100, clock=lambda: now[0])
    for tokens in (60, 30, 30, 500):
        limit.wait(tokens, sleep)
    assert slept == [60, 60]  # the last is longer than a minute's tokens and goes alone


def test_a_stopped_client_waits_for_no_limit(server) -> None:
    client = JudgeClient("m", server.base_url, limit=RateLimit(1))
    client.ask([{"role": "user", "content": "hi"}])
    waiting = threading.Timer(0.1, client.stop)
    waiting.start()
    start = time.monotonic()
    with pytest.raises(JudgeUnreachable, match="stopped"):
        client.ask([{"role": "user", "content": "hi"}])
    assert time.monotonic() - start < 10
    assert len(server.bodies) == 1


def test_a_batch_answers_all_and_what_fails_in_it_is_asked_singly(
    batch_server, config, questions, answers, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("llm_at_home.evaluation.judge.batch.POLL_S", 0.01)
    monkeypatch.setattr("llm_at_home.evaluation.judge.batch.replies.__defaults__", (0.01, lambda seconds: None))
    batch_server.answer = lambda body: None if "w1?" in body["messages"][1]["content"] else "Rating: [[7]]"
    batch_server.default = lambda body: batch_server.say("Rating: [[3]]")
    config |= {"base_url": batch_server.base_url, "batch": True, "prices": PRICES}
    _, counts, costs = judge_run(config, questions, answers, None, tmp_path)
    scores = {(row["question_id"], row["turn"]): row["score"] for row in read_jsonl(tmp_path / "judgments.jsonl")}
    assert scores == {(1, 1): 3, (1, 2): 3, (2, 1): 7, (2, 2): 7, (3, 1): 7, (3, 2): 7}
    assert counts["judge_calls"] == 6
    assert not (tmp_path / PENDING).exists()
    whole = (11 * 30 + 3 * 60) / 1e6
    assert costs["judge_cost"].value == pytest.approx(4 * 0.5 * whole + 2 * whole), "four of six at half the price"
    sent = json.loads(batch_server.files["file-1"].splitlines()[0])
    assert (sent["method"], sent["url"], sent["body"]["model"]) == ("POST", "/v1/chat/completions", "judge-snapshot-1")


def test_an_interrupted_batch_is_waited_for_and_not_sent_again(
    batch_server, config, questions, answers, tmp_path, monkeypatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    config |= {"base_url": batch_server.base_url, "batch": True}
    monkeypatch.setattr("llm_at_home.evaluation.judge.batch.replies.__defaults__", (0.01, interrupt))
    with pytest.raises(KeyboardInterrupt):
        judge_run(config, questions, answers, None, tmp_path)
    assert json.loads((tmp_path / PENDING).read_text())["batch"] == "batch-1"
    uploaded = dict(batch_server.files)
    monkeypatch.setattr("llm_at_home.evaluation.judge.batch.replies.__defaults__", (0.01, lambda seconds: None))
    _, counts, _ = judge_run(config, questions, answers, None, tmp_path)
    assert counts["judgments"] == 6
    assert batch_server.files["file-1"] == uploaded["file-1"]


def test_a_server_without_batches_is_named(server, config, questions, answers, tmp_path) -> None:
    from http.server import BaseHTTPRequestHandler

    server._http.RequestHandlerClass.do_POST = lambda handler: BaseHTTPRequestHandler.send_error(handler, 404)
    with pytest.raises(JudgeDenied, match=r"judge\.batch=false"):
        judge_run(config | {"batch": True}, questions, answers, None, tmp_path)


def test_repeats_give_the_judge_s_own_noise(server, config, questions, answers, tmp_path) -> None:
    scores = iter([5, 7] * 6)
    server.default = lambda body: server.say(f"[[{next(scores)}]]")
    readings, counts, _ = judge_run(config | {"repeats": 2, "concurrency": 1}, questions, answers, None, tmp_path)
    assert (counts["judgments"], readings["judge_score_mean"].value, readings["judge_score_mean"].n) == (12, 6, 3)
    assert readings["judge_repeat_sd"].value == pytest.approx(2**0.5)


def test_every_sample_is_judged(server, config, questions, answers, baseline, tmp_path) -> None:
    answers[0]["choices"].append({"index": 1, "turns": ["second 1", "second 2"]})
    _, counts, _ = judge_run(config, questions, answers, None, tmp_path)
    rows = list(read_jsonl(tmp_path / "judgments.jsonl"))
    assert counts["judgments"] == 8
    assert sorted((row["turn"], row["sample"]) for row in rows if row["question_id"] == 1) == [
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]


def test_a_sample_without_a_counterpart_is_counted(server, config, questions, answers, baseline, tmp_path) -> None:
    answers[0]["choices"].append({"index": 1, "turns": ["second 1", "second 2"]})
    server.default = lambda body: server.say("[[C]]")
    _, counts, _ = judge_run(config | {"mode": "pairwise"}, questions, answers, baseline, tmp_path)
    assert (counts["judgments"], counts["answers_missing"]) == (6, 2)


def test_all_pairs_give_each_model_its_win_rate(server, config, questions, answers, baseline, tmp_path) -> None:
    third = [{**row, "model_id": "ours"} for row in answers]  # the same name: two seeds of it

    def verdict(body):
        text = body["messages"][1]["content"].split("|")
        ours = [part.startswith("ours") for part in text if part.startswith(("ours", "base"))][:2]
        return server.say("[[C]]" if ours[0] == ours[1] else "[[A]]" if ours[0] else "[[B]]")

    server.default = verdict
    config |= {"mode": "all_pairs"}
    readings, counts, _ = judge_run(config, questions[2:], answers, None, tmp_path, others=[baseline, third])
    assert {name: reading.value for name, reading in readings.items()} == {
        "win_rate_of_base": 0.0,
        "win_rate_of_ours": 0.75,
        "win_rate_of_ours#2": 0.75,
    }
    assert counts["judgments"] == 6


def test_all_pairs_need_several_runs(config, questions, answers, tmp_path) -> None:
    with pytest.raises(Refusal, match="all_pairs"):
        judge_run(config | {"mode": "all_pairs"}, questions, answers, None, tmp_path)
    with pytest.raises(Refusal, match="all_pairs"):
        judge_run(config, questions, answers, None, tmp_path, others=[answers])


def test_one_turn_questions_share_a_run_with_two(server, config, answers, tmp_path) -> None:
    one = SimpleNamespace(question_id=1, category="writing", turns=["w1?"], reference=None)
    _, counts, _ = judge_run(config, [one], answers, None, tmp_path)
    assert (counts["judgments"], counts["answers_missing"]) == (1, 0)
