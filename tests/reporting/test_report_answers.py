"""The browser of answers and the radar charts: what a judge said, drawn and side by side, and nothing that runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from llm_at_home.records.schema import Reading
from llm_at_home.reporting import write_report
from llm_at_home.reporting.__main__ import main

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
HOSTILE = "</pre></script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def write_rows(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def scored(make, of, config_hash, shift, **more):
    record = make.judge(of, config_hash, method="local/single")
    record.quality |= {
        f"judge_score_{name}": make.reading(2.0 + place + shift, "points", "local/single", n=2)
        for place, name in enumerate(CATEGORIES)
    }
    record.quality |= {
        f"win_rate_{name}": make.reading(0.1 * place, "1", "local/pairwise", n=2)
        for place, name in enumerate(CATEGORIES)
    }
    record.config |= {"judge": {"model": "tiny-judge", "references": None}} | more
    return record


@pytest.fixture
def judged(make, save, runs):
    """Two runs with answers and judgments; one question's text is at hand (home_bench), another's is not."""
    for quant, shift in (("none", 0.0), ("nf4", -0.5)):
        run = make.infer(
            f"infer-{quant}", quant=quant, questions={"name": "home_bench", "source": "home_bench", "path": None}
        )
        place = save(run, f"answers-{quant}").parent
        turns = [HOSTILE if quant == "nf4" else f"first of {quant}", f"second of {quant}"]
        rows = [
            {"question_id": q, "model_id": quant, "choices": [{"index": 0, "turns": turns}], "category": "writing"}
            for q in (1001, 9999)
        ]
        write_rows(place / "answers.jsonl", rows)
        folder = save(scored(make, run, f"judge-{quant}", shift), f"judge-{quant}").parent
        single = {"question_id": 1001, "model": quant, "judge": ["tiny-judge", "single-v1"], "turn": 1, "sample": 0}
        pair = {
            "question_id": 1001,
            "model_1": quant,
            "model_2": HOSTILE,
            "judge": ["tiny-judge", "pair-v2"],
            "turn": 2,
        }
        write_rows(
            folder / "judgments.jsonl",
            [
                {**single, "score": 7.25, "judgment": HOSTILE},
                {**single, "sample": 1, "score": -1, "judgment": "?", "missing": "no rating in the reply"},
                {**pair, "g1_winner": "model_1", "g2_winner": "tie", "g1_judgment": "[[A]]", "g2_judgment": "[[C]]"},
                {"question_id": 1001, "turn": "no turn"},
            ],
        )
        (place / "answers.jsonl").open("a").write('{"question_id": 1002, "choi')
    return runs


@pytest.fixture
def report(judged, tmp_path, capsys):
    write_report([judged], tmp_path / "report")
    return tmp_path / "report"


def test_questions_answers_and_judgments_stand_side_by_side(report) -> None:
    text = (report / "answers.html").read_text()
    assert 'href="answers.html"' in (report / "index.html").read_text()
    assert text.count('<div class="answer"') == 2 * 2 * 2
    assert "Write a short note (three or four sentences) to your neighbours" in text
    assert "The text of this question is not on this machine." in text
    assert text.count("7.25 of 10") == 2
    assert text.count("no score: no rating in the reply, sample 2") == 2
    assert text.count("wins against") == text.count("ties against") == 2
    assert re.search(r"Reference answer.*Dear neighbours", text, re.DOTALL)


def test_only_the_page_s_own_script_is_there(report) -> None:
    text = (report / "answers.html").read_text()
    assert text.count("<script>") == 1
    assert "<img" not in text
    assert "default-src 'none'" in text


def test_no_judge_no_page(make, save, runs, tmp_path, capsys) -> None:
    save(make.infer(), "a")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "answers.html").write_text("of an earlier report")
    write_report([runs], tmp_path / "report")
    assert not (tmp_path / "report" / "answers.html").exists()
    assert "answers.html" not in (tmp_path / "report" / "index.html").read_text()


def test_a_radar_has_an_outline_a_run_and_a_corner_a_category(report) -> None:
    text = (report / "index.html").read_text()
    charts = re.findall(r'<figure id="figure-[^"]*" class="radar">.*?</figure>', text, re.DOTALL)
    assert len(charts) == 2, "scores and win rates"
    scores = next(chart for chart in charts if "score by category" in chart)
    outlines = re.findall(r'<g class="outline series-(\d)">.*?<polygon points="([^"]*)"', scores, re.DOTALL)
    assert [style for style, _ in outlines] == ["0", "1"]
    assert all(len(points.split()) == len(CATEGORIES) for _, points in outlines)
    assert "writing 2.00" in scores
    assert "writing 1.50" in scores
    # The first axis, in alphabetical order, points up: coding, 6 and 5.5 of 10, on a radius of 116 around (200, 200).
    tops = {points.split()[0] for _, points in outlines}
    assert tops == {f"200.0,{200 - 116 * share:.1f}" for share in (0.6, 0.55)}
    rates = next(chart for chart in charts if "Win rate" in chart)
    header = (report / "figures" / "radar-judge_score_mean-0.csv").read_text().splitlines()[0]
    assert header.startswith('run,"coding, points"')
    assert 'class="neutral"' in rates
    assert 'class="neutral"' not in scores


def test_a_run_that_lacks_a_category_is_named_and_not_drawn(make, save, runs, tmp_path, capsys) -> None:
    for number, quant in enumerate(("none", "nf4")):
        run = make.infer(f"infer-{quant}", quant=quant)
        save(run, f"i{number}")
        record = scored(make, run, f"judge-{quant}", 0.0)
        if quant == "nf4":
            record.quality["judge_score_math"] = Reading.unknown("points", "all 2 judgments are missing")
        save(record, f"j{number}")
    write_report([runs], tmp_path / "report")
    text = (tmp_path / "report" / "index.html").read_text()
    assert "Not drawn, for want of a category: nf4." in text


def test_a_judge_s_test_stands_beside_its_scores(make, save, runs, tmp_path, capsys) -> None:
    run = make.infer()
    save(run, "i")
    judge = {"model": "tiny-judge", "references": None}
    save(scored(make, run, "j", 0.0), "j")
    check = make.judge(run, "c")
    check.config |= {"task": "judge_check", "judge": {**judge, "mode": "both"}}
    check.quality = {"judge_accuracy": make.reading(0.61, "1", "local/planted_pairs", spread=0.1, n=27)}
    check.subject = None
    save(check, "c")
    write_report([runs], tmp_path / "report")
    rows = (tmp_path / "report" / "evaluations.csv").read_text().splitlines()
    assert all("61" in row for row in rows[1:])


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium here")
def test_no_script_of_an_answer_runs_in_a_browser(report) -> None:
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=2000"]
    done = subprocess.run([*command, f"file://{report}/answers.html"], capture_output=True, text=True, timeout=100)
    assert "<title>llm-at-home: answers</title>" in done.stdout
    assert 'class="choose"' in done.stdout
    assert not re.search(r'<form class="choose" hidden', done.stdout), "the page's own script did run"


def test_runs_on_more_questions_have_a_radar_of_their_own(tmp_path) -> None:
    results = Path(__file__).resolve().parents[2] / "results"
    folders = [str(results / machine / "mt_bench" / "single") for machine in ("h100", "two_core_cpu")]
    assert main([*folders, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "index.html").read_text()
    assert set(re.findall(r"/single, mt_bench \((\d+) questions\)</strong>", text)) == {"16", "80"}
