"""FastChat's own ``show_result`` reads our judgments and says what our record says; published files are read by us."""

import importlib.util
import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from llm_at_home.evaluation.judge import judge_run
from llm_at_home.evaluation.judge.agreement import agreement, load

# Rows in the very fields of FastChat's common.py (play_a_match_single, play_a_match_pair) and nothing else.
PUBLISHED_SINGLE = {
    "question_id": 1,
    "model": "alpaca-13b",
    "judge": ["gpt-4", "single-v1"],
    "user_prompt": "...",
    "judgment": "... Rating: [[4]]",
    "score": 4,
    "turn": 1,
    "tstamp": 1687222451.9,
}
PUBLISHED_PAIR = {
    "question_id": 1,
    "model_1": "alpaca-13b",
    "model_2": "gpt-3.5-turbo",
    "g1_winner": "model_2",
    "g2_winner": "model_2",
    "judge": ["gpt-4", "pair-v2"],
    "g1_user_prompt": "...",
    "g1_judgment": "[[B]]",
    "g2_user_prompt": "...",
    "g2_judgment": "[[A]]",
    "turn": 1,
    "tstamp": 1687222451.9,
}


def test_published_judgments_are_read(tmp_path) -> None:
    single, pairs = tmp_path / "gpt-4_single.jsonl", tmp_path / "gpt-4_pair.jsonl"
    single.write_text(
        "".join(
            json.dumps({**PUBLISHED_SINGLE, "model": m, "score": s}) + "\n"
            for m, s in (("alpaca-13b", 4), ("gpt-3.5-turbo", 8))
        )
    )
    pairs.write_text(json.dumps(PUBLISHED_PAIR) + "\n")
    found = agreement(load(single), load(pairs))
    assert (found.votes, found.with_ties) == (1, 1.0)


def test_published_answers_are_judged(server, config, questions, tmp_path) -> None:
    row = {"question_id": 1, "answer_id": "x", "model_id": "gpt-4", "choices": [{"index": 0, "turns": ["a", "b"]}]}
    quality, counts, _ = judge_run(config, questions, [{**row, "tstamp": 1.5}], None, tmp_path)
    assert (counts["judgments"], counts["answers_missing"], quality["judge_score_mean"].value) == (2, 4, 7)


@pytest.fixture(scope="module")
def show_result(tmp_path_factory) -> ModuleType:
    folder = tmp_path_factory.mktemp("fschat")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "fschat==0.2.36"]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    spec = importlib.util.spec_from_file_location("show_result", folder / "fastchat" / "llm_judge" / "show_result.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["single", "both"])
def test_show_result_prints_our_means(
    show_result, server, config, questions, answers, baseline, tmp_path, capsys, mode
) -> None:
    scores = iter([3, 8, 6, 9, 2, 7])
    server.default = lambda body: server.say(
        "[[A]]" if body["messages"][1]["content"].startswith("pair") else f"[[{next(scores)}]]"
    )
    config |= {"concurrency": 1, "mode": mode}
    quality, _, _ = judge_run(config, questions, answers, baseline, tmp_path)
    options = {"bench_name": "mt_bench", "judge_model": "j", "model_list": None}
    show_result.display_result_single(SimpleNamespace(input_file=str(tmp_path / "judgments.jsonl"), **options))
    out = capsys.readouterr().out
    printed = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("ours")]
    expected = [quality[f"judge_score_{name}"].value for name in ("turn_1", "turn_2", "mean")]
    assert printed == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("baseline_model", ["base", None])
def test_show_result_prints_our_win_rate(
    show_result, server, config, questions, answers, baseline, tmp_path, capsys, baseline_model
) -> None:
    replies = iter("AB BA AA CC AB ??".replace(" ", ""))
    server.default = lambda body: server.say(f"[[{next(replies)}]]")
    config |= {"mode": "pairwise", "concurrency": 1}
    quality, counts, _ = judge_run(config, questions, answers, baseline, tmp_path)
    assert counts["judgments_missing"] == 1
    options = {"bench_name": "mt_bench", "judge_model": "j", "model_list": None, "baseline_model": baseline_model}
    show_result.display_result_pairwise(SimpleNamespace(input_file=str(tmp_path / "judgments.jsonl"), **options))
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("ours"))
    assert float(row[-1]) == pytest.approx(quality["win_rate"].value, abs=1e-4)
