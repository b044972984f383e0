"""Two judged runs, and two judges: figures that were worked out by hand."""

import json

import numpy as np
import pytest

from llm_at_home.errors import Refusal
from llm_at_home.evaluation.__main__ import main
from llm_at_home.evaluation.judge.agreement import agreement, from_rows, load, spearman
from llm_at_home.evaluation.judge.comparison import compare_rows, permutation_p_value
from llm_at_home.records import store
from llm_at_home.records.schema import Record


def single(question, model, score, turn=1, judge="j", category="math"):
    return {
        "question_id": question,
        "model": model,
        "score": score,
        "turn": turn,
        "judge": [judge, "single-v1"],
        "category": category,
    }


def pair(question, first, second, winners, judge="j", turn=1):
    return {
        "question_id": question,
        "model_1": first,
        "model_2": second,
        "g1_winner": winners[0],
        "g2_winner": winners[1],
        "turn": turn,
        "judge": [judge, "pair-v2"],
    }


def test_a_difference_is_paired_by_question() -> None:
    a = [single(q, "a", s) for q, s in enumerate([5, 6, 9, 4])] + [single(9, "a", 10)]
    b = [single(q, "b", s) for q, s in enumerate([4, 5, 8, 3])] + [single(8, "b", -1)]
    found = compare_rows(a, b)
    assert (found.difference, found.n, found.missing) == (1, 4, 1)
    assert found.interval95 == (1, 1)
    assert found.detectable == 0
    assert found.p_value == pytest.approx(2 / 16, abs=0.02), "all of 16 signs but two are nearer to 0"
    assert compare_rows(a, [single(77, "b", 3)]) is None


def test_noise_has_no_small_p_value_and_a_shift_has() -> None:
    draw = np.random.default_rng(0)
    noise = draw.normal(0, 1, 40)
    assert permutation_p_value(noise - noise.mean()) > 0.9
    assert permutation_p_value(noise + 1) < 0.001


def run_folder(tmp_path, name, rows, seed, **judge):
    folder = tmp_path / name
    config = {"model": {"name": "m"}, "quant": {"name": "none"}, "seed": seed}
    record = Record("evaluate", config={"task": "judge", "judge": judge}, subject={"config": config})
    store.save(record, folder)
    (folder / "judgments.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_two_runs_are_compared_from_the_command_line(tmp_path, capsys) -> None:
    a = run_folder(tmp_path, "a", [single(q, "m", 5 + q % 2, turn) for q in range(6) for turn in (1, 2)], 0)
    b = run_folder(tmp_path, "b", [single(q, "m", 5, turn) for q in range(6) for turn in (1, 2)], 1)
    assert main(["compare", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "+0.500" in out
    assert "noise floor" in out
    assert "of the 3 lines below the first, one in twenty shows" in out
    d = run_folder(tmp_path, "d", [single(q, "m", 9) for q in range(20)], 1, rating="expected")
    assert main(["compare", str(a), str(d)]) == 2
    assert "judge.rating=None and by expected do not compare" in capsys.readouterr().err
    e = run_folder(tmp_path, "e", [single(q, "m", 5) for q in range(20)], 1, rating="expected")
    assert main(["compare", str(d), str(e)]) == 0
    assert " <0.001 " in capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:-2]] == ["all", "turn", "turn", "math"]
    c = run_folder(tmp_path, "c", [single(1, "m", 5, judge="another")], 1)
    assert main(["compare", str(a), str(c)]) == 2
    assert "two judges" in capsys.readouterr().err


def test_agreement_with_ties_and_without() -> None:
    j = from_rows("j", [pair(q, "a", "b", w) for q, w in enumerate([("model_1",) * 2, ("model_2",) * 2, ("tie",) * 2])])
    k = from_rows(
        "k",
        [
            pair(0, "b", "a", ("model_2", "model_2")),  # the same verdict, with the models the other way round
            pair(1, "a", "b", ("model_1", "model_1")),
            pair(2, "a", "b", ("model_1", "model_2")),  # orders that disagree are a tie
            pair(3, "a", "b", ("error", "tie")),
        ],
    )
    found = agreement(j, k)
    assert (found.votes, found.with_ties) == (3, pytest.approx(2 / 3))
    assert (found.decided, found.without_ties) == (2, 0.5)


def test_scores_vote_too_and_a_judge_s_own_model_is_watched() -> None:
    vain = from_rows("vain", [single(q, m, s, judge="a") for q in range(4) for m, s in (("a", 9), ("b", 5))])
    other = from_rows("other", [single(q, m, s) for q in range(4) for m, s in (("a", 4 + 4 * (q % 2)), ("b", 5))])
    found = agreement(vain, other)
    assert (found.votes, found.with_ties, found.decided) == (4, 0.5, 4)
    assert found.self_preference == {"a": 0.5}
    assert found.answers == 8


def test_people_grade_whole_conversations(tmp_path, capsys) -> None:
    grades = tmp_path / "people.csv"
    lines = ["question_id,model,rater,grade"]
    lines += [
        f"{q},{m},{r},{g}" for q in (1, 2) for r in ("x", "y") for m, g in (("a", 5), ("b", 2 if r == "x" else 5))
    ]
    grades.write_text("\n".join(lines) + "\n")
    rows = [single(q, m, s, turn) for q in (1, 2) for turn in (1, 2) for m, s in (("a", 8), ("b", 3 + turn))]
    file = tmp_path / "judgments.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = agreement(load(file), load(grades))
    assert (found.votes, found.with_ties, found.decided, found.without_ties) == (4, 0.5, 2, 1.0)
    assert main(["agreement", str(file), str(grades)]) == 0
    assert "50.0 %" in capsys.readouterr().out
    # As grades.csv of an unfinished study, and as a spreadsheet saves it.
    grades.write_text("\n".join([*lines, "3,a,x,", "3,b,x,"]) + "\n", encoding="utf-8-sig")
    assert agreement(load(file), load(grades)) == found
    grades.write_text("question_id,model,grade\n1,a,5\n")
    assert main(["agreement", str(file), str(grades)]) == 2
    assert "rater" in capsys.readouterr().err


def test_judges_with_nothing_in_common_are_refused() -> None:
    with pytest.raises(Refusal, match="nothing in common"):
        agreement(from_rows("j", [single(1, "a", 5)]), from_rows("k", [single(2, "a", 5)]))
    with pytest.raises(Refusal, match="row 1"):
        from_rows("j", [{"question_id": 1}])


def test_rank_correlation() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 4], [1, 3, 3, 4]) == pytest.approx(1)
    assert spearman([1, 1, 1], [1, 2, 3]) is None
