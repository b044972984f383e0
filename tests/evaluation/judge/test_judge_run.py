"""The whole way from answers to readings, against a real HTTP server."""

import json
import threading

import pytest

from llm_at_home.errors import Refusal
from llm_at_home.evaluation.judge import judge_run
from llm_at_home.evaluation.judge.client import JudgeDenied, JudgeUnreachable
from llm_at_home.records.jsonl import read_jsonl


def user(body) -> str:
    return body["messages"][-1]["content"]


def rows_of(folder):
    return {(row["question_id"], row["turn"]): row for row in read_jsonl(folder / "judgments.jsonl")}


def test_single_scores_in_fastchat_s_fields(server, config, questions, answers, tmp_path) -> None:
    server.default = lambda body: server.say("Good. Rating: [[8]]" if "multi-turn" in user(body) else "[[5.5]]")
    readings, counts, _ = judge_run(config, questions, answers, None, tmp_path)
    row = rows_of(tmp_path)[2, 2]
    fastchat = {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"}
    assert fastchat <= set(row)
    assert row["judge"] == ["judge-snapshot-1", "single-math-v1-multi-turn"]
    assert row["user_prompt"] == "single-math-v1-multi-turn: m1?|ours 2.1|m2?|ours 2.2|ref=4|ref=5"
    assert (row["model"], row["score"], row["judgment"]) == ("ours", 8, "Good. Rating: [[8]]")
    assert (row["served_model"], row["missing"], row["asked"]) == ("served-snapshot", None, 1)
    assert rows_of(tmp_path)[3, 1]["user_prompt"] == "single-v1: s1?|ours 3.1"
    assert readings["judge_score_mean"].value == 6.75
    assert readings["judge_score_turn_1"].value == 5.5
    assert readings["judge_score_turn_2"].value == 8
    assert readings["judge_score_math"].value == 6.75
    assert {reading.method for reading in readings.values()} == {"server/single"}
    assert counts == {
        "judgments": 6,
        "judgments_missing": 0,
        "inconsistent_orders": 0,
        "answers_missing": 0,
        "judge_calls": 6,
        "judge_retries": 0,
        "judge_failures": 0,
        "judge_prompt_tokens": 66,
        "judge_completion_tokens": 18,
    }


def test_pairs_are_judged_in_both_orders(server, config, questions, answers, baseline, tmp_path) -> None:
    def verdict(body):
        text = user(body)
        if "w1?" in text:  # ours, wherever it stands
            return server.say("[[A]]" if text.index("ours") < text.index("base") else "[[B]]")
        if "m1?" in text:  # whoever stands first
            return server.say("[[A]]")
        return server.say(
            "[[C]]" if "multi" in text else "[[A]]" if text.index("base") < text.index("ours") else "[[B]]"
        )

    server.default = verdict
    readings, counts, _ = judge_run(config | {"mode": "pairwise"}, questions, answers, baseline, tmp_path)
    rows = rows_of(tmp_path)
    assert {key: (row["g1_winner"], row["g2_winner"]) for key, row in rows.items()} == {
        (1, 1): ("model_1", "model_1"),
        (1, 2): ("model_1", "model_1"),
        (2, 1): ("model_1", "model_2"),
        (2, 2): ("model_1", "model_2"),
        (3, 1): ("model_2", "model_2"),
        (3, 2): ("tie", "tie"),
    }
    row = rows[2, 1]
    assert (row["model_1"], row["model_2"]) == ("ours", "base")
    assert row["judge"] == ["judge-snapshot-1", "pair-math-v1"]
    assert row["g1_user_prompt"] == "pair-math-v1: m1?|ours 2.1|base 2.1|ref=4"
    assert row["g2_user_prompt"] == "pair-math-v1: m1?|base 2.1|ours 2.1|ref=4"
    assert {"g1_judgment", "g2_judgment", "turn", "tstamp"} <= set(row)
    assert readings["win_rate"].value == pytest.approx((1 + 1 + 0.5 + 0.5 + 0 + 0.5) / 6)
    assert readings["win_rate_writing"].value == 1
    assert readings["win_rate_math"].value == 0.5
    assert readings["win_rate_stem"].value == 0.25
    assert (counts["judgments"], counts["inconsistent_orders"], counts["judge_calls"]) == (6, 2, 12)
    assert "judge_score_mean" not in readings
    assert {name: counts[name] for name in ("wins", "ties", "losses", "no_verdict")} == {
        "wins": 2,
        "ties": 3,
        "losses": 1,
        "no_verdict": 0,
    }
    # Of ten orders with a winner, question 2's four went to the first; of the others half did.
    assert readings["judge_first_wins"].value == pytest.approx((4 + 3) / 10)
    assert readings["judge_longer_wins"].value is None, "all answers are of one length"


def test_both_modes_share_a_file(server, config, questions, answers, baseline, tmp_path) -> None:
    server.default = lambda body: server.say("[[A]]" if user(body).startswith("pair") else "[[4]]")
    readings, counts, _ = judge_run(config | {"mode": "both"}, questions, answers, baseline, tmp_path)
    assert (readings["judge_score_mean"].value, readings["win_rate"].value) == (4, 0.5)
    assert (counts["judgments"], counts["judge_calls"], counts["inconsistent_orders"]) == (12, 18, 6)


def test_an_unreadable_rating_is_asked_once_more_and_then_missing(server, config, questions, answers, tmp_path) -> None:
    server.script = [
        server.say("Lovely!"),
        server.say("Rating: [[6]]"),
        server.say("[[42]]"),
        server.say(None, "length"),
    ]
    readings, counts, _ = judge_run(config | {"concurrency": 1}, questions[:1], answers, None, tmp_path)
    assert server.bodies[0] == server.bodies[1]
    assert server.bodies[2] == server.bodies[3]
    first, second = rows_of(tmp_path).values()
    assert (first["score"], first["asked"], first["missing"]) == (6, 2, None)
    assert (second["score"], second["asked"]) == (-1, 2)
    assert "max_tokens" in second["missing"]
    assert (counts["judgments"], counts["judgments_missing"], counts["judge_calls"]) == (1, 1, 4)
    assert readings["judge_score_mean"].value == 6
    assert readings["judge_score_turn_2"].value is None
    assert "no rating in the reply" in readings["judge_score_turn_2"].reason


def test_a_pair_with_one_unreadable_order_counts_for_nobody(
    server, config, questions, answers, baseline, tmp_path
) -> None:
    server.default = lambda body: server.say("[[A]]" if user(body).index("ours") < user(body).index("base") else "?")
    readings, counts, _ = judge_run(config | {"mode": "pairwise"}, questions, answers, baseline, tmp_path)
    assert {(row["g1_winner"], row["g2_winner"]) for row in rows_of(tmp_path).values()} == {("model_1", "error")}
    assert readings["win_rate"].value is None
    assert (counts["judgments"], counts["judgments_missing"], counts["inconsistent_orders"]) == (0, 6, 0)


def test_a_rejected_request_is_missing_with_its_reason(server, config, questions, answers, tmp_path) -> None:
    server.default = lambda body: server.fail(400, {"error": {"message": "context size exceeded"}})
    readings, counts, _ = judge_run(config, questions, answers, None, tmp_path)
    assert counts["judgments_missing"] == 6
    assert "context size exceeded" in readings["judge_score_mean"].reason
    assert "context size exceeded" in rows_of(tmp_path)[1, 1]["missing"]


def test_turns_without_an_answer_are_counted(server, config, questions, answers, tmp_path) -> None:
    answers[0]["choices"][0]["turns"].pop()
    _, counts, _ = judge_run(config, questions, answers[:2], None, tmp_path)
    assert (counts["judgments"], counts["answers_missing"]) == (3, 3)


def test_no_answer_at_all_is_an_unknown_reading(server, config, questions, tmp_path) -> None:
    readings, counts, _ = judge_run(config, questions, [], None, tmp_path)
    assert (readings["judge_score_mean"].value, readings["judge_score_mean"].reason) == (
        None,
        "no answer to judge",
    )
    assert counts["answers_missing"] == 6
    assert server.bodies == []


def test_a_finished_run_asks_nothing_and_says_the_same(server, config, questions, answers, baseline, tmp_path) -> None:
    server.default = lambda body: server.say(
        "[[A]]" if user(body).startswith("pair") else f"[[{len(user(body)) % 9 + 1}]]"
    )
    first, _, _ = judge_run(config | {"mode": "both"}, questions, answers, baseline, tmp_path)
    asked = len(server.bodies)
    again, counts, _ = judge_run(config | {"mode": "both"}, questions, answers, baseline, tmp_path)
    assert again == first
    assert (len(server.bodies), counts["judge_calls"], counts["judgments"]) == (asked, 0, 12)


def test_changed_answers_and_settings_are_judged_anew(server, config, questions, answers, tmp_path) -> None:
    judge_run(config, questions, answers, None, tmp_path)
    answers[1]["choices"][0]["turns"][1] = "another"
    server.default = lambda body: server.say("[[1]]")
    readings, counts, _ = judge_run(config, questions, answers, None, tmp_path)
    assert (counts["judge_calls"], counts["judgments"]) == (1, 6)
    assert readings["judge_score_mean"].value == pytest.approx((5 * 7 + 1) / 6)
    _, counts, _ = judge_run(config | {"max_tokens": 65}, questions, answers, None, tmp_path)
    assert (counts["judge_calls"], counts["judgments"]) == (6, 6)


def test_judgments_of_other_answers_are_set_aside_and_come_back(server, config, questions, answers, tmp_path) -> None:
    before, _, _ = judge_run(config, questions, answers, None, tmp_path)
    other = json.loads(json.dumps(answers))
    for row in other:
        row["choices"][0]["turns"] = ["another"] * len(row["choices"][0]["turns"])
    server.default = lambda body: server.say("[[1]]")
    judge_run(config, questions, other, None, tmp_path)
    assert [row["score"] for row in read_jsonl(tmp_path / "judgments.jsonl")] == [1] * 6
    again, counts, _ = judge_run(config, questions, answers, None, tmp_path)
    assert (again, counts["judge_calls"]) == (before, 0)
    assert {row["score"] for row in read_jsonl(tmp_path / "judgments.jsonl")} == {7}
    assert len(list(read_jsonl(tmp_path / "judgments.previous.jsonl"))) == 12
    _, counts, _ = judge_run(config, questions, other, None, tmp_path)
    assert counts["judge_calls"] == 0
    assert len(list(read_jsonl(tmp_path / "judgments.previous.jsonl"))) == 12


def test_a_file_cut_at_any_byte_goes_on_and_loses_one_item(server, config, questions, answers, tmp_path) -> None:
    whole, _, _ = judge_run(config, questions, answers, None, tmp_path)
    path = tmp_path / "judgments.jsonl"
    data = path.read_bytes()
    for cut in range(0, len(data), 97):
        path.write_bytes(data[:cut])
        before = len(server.bodies)
        readings, counts, _ = judge_run(config, questions, answers, None, tmp_path)
        assert len(server.bodies) - before == counts["judge_calls"] <= 6 - data[:cut].count(b"\n")
        assert counts["judgments"] == 6
        assert readings == whole
        assert len(path.read_text().splitlines()) == 6


def test_a_denied_key_ends_the_run_and_keeps_what_was_paid_for(server, config, questions, answers, tmp_path) -> None:
    server.script = [server.say("[[3]]"), server.say("[[3]]"), server.fail(401, {"error": {"message": "no"}})]
    with pytest.raises(JudgeDenied, match="401"):
        judge_run(config | {"concurrency": 1}, questions, answers, None, tmp_path)
    assert len(rows_of(tmp_path)) >= 2
    assert len(server.bodies) <= 4
    _, counts, _ = judge_run(config, questions, answers, None, tmp_path)
    assert counts["judgments"] == 6
    assert len(rows_of(tmp_path)) == 6


def test_a_server_that_is_down_ends_the_run_soon(server, config, questions, answers, tmp_path) -> None:
    server.default = lambda body: server.fail(503)
    with pytest.raises(JudgeUnreachable, match="the same command goes on"):
        judge_run(config | {"concurrency": 1}, questions, answers, None, tmp_path)
    assert len(server.bodies) <= 4
    assert rows_of(tmp_path) == {}


def test_a_passing_outage_is_missing_now_and_asked_for_next_time(server, config, questions, answers, tmp_path) -> None:
    server.script = [server.fail(503), server.say("[[9]]"), server.drop_mid_body()]
    readings, counts, _ = judge_run(config | {"concurrency": 1}, questions, answers, None, tmp_path)
    assert (counts["judgments"], counts["judgments_missing"], counts["judge_failures"]) == (4, 2, 2)
    assert readings["judge_score_mean"].value == pytest.approx((9 + 3 * 7) / 4)
    assert len(rows_of(tmp_path)) == 4
    _, counts, _ = judge_run(config, questions, answers, None, tmp_path)
    assert (counts["judgments"], counts["judgments_missing"], counts["judge_calls"]) == (6, 0, 2)


def test_several_are_under_way_at_once(server, config, questions, answers, tmp_path) -> None:
    together = threading.Barrier(3, timeout=5)

    def wait_for_three(body):
        together.wait()
        return server.say("[[2]]")

    server.default = wait_for_three
    readings, _, _ = judge_run(config | {"concurrency": 3}, questions, answers, None, tmp_path)
    assert readings["judge_score_mean"].value == 2


def test_the_key_stays_out_of_the_file(server, config, questions, answers, tmp_path, monkeypatch, capfd) -> None:
    key = "secret-0123456789"
    monkeypatch.setenv("JUDGE_TEST_KEY", key)
    server.script = [server.say(f"{key} [[5]]"), server.fail(400, {"error": {"message": f"what is {key}?"}})]
    readings, _, _ = judge_run(config | {"api_key_env": "JUDGE_TEST_KEY"}, questions, answers, None, tmp_path)
    assert server.headers[0]["authorization"] == f"Bearer {key}"
    text = (tmp_path / "judgments.jsonl").read_text()
    assert text.count("[key]") == 2
    for seen in (text, json.dumps({k: str(v) for k, v in readings.items()}), *capfd.readouterr()):
        assert key not in seen


def test_input_that_cannot_be_judged_is_refused(server, config, questions, answers, tmp_path) -> None:
    with pytest.raises(Refusal, match="FastChat"):
        judge_run(config, questions, [{"question_id": 1, "model_id": "m", "choices": []}], None, tmp_path)
    questions[0].turns.append("and a third?")
    with pytest.raises(Refusal, match="3 turns"):
        judge_run(config, questions, answers, None, tmp_path)
    assert server.bodies == []
