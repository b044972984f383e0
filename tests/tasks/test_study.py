"""`make study`: what it prints, writes and logs for a study that is finished, half done, or not begun.

The grades here are made up, to see that they are counted right; they are no study's result.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from llm_at_home.data.questions import Question
from llm_at_home.human.runs import Material, Model
from llm_at_home.human.study import Study
from llm_at_home.records import store
from llm_at_home.records.schema import Reading, Record
from llm_at_home.reporting import published
from llm_at_home.tasks import study as program

ROOT = Path(__file__).resolve().parents[2]
PAPERS = (81, 103, 119, 143, 158)
#: What each rater gives each model on every question, before the rater's own mildness.
GRADES = {"base": 4, "base-nf4": 3, "base-awq": 2, "base-lora": 3}


@pytest.fixture
def study(tmp_path):
    questions = [Question(number, "writing", ["one?", "two?"]) for number in PAPERS]
    models = [
        Model("base", "base", "a", {"quant": {"name": "none"}}, "h0", "none"),
        Model("base-nf4", "base-nf4", "b", {"quant": {"name": "nf4"}}, "h1", "none"),
        Model("base-awq", "base-awq", "c", {"quant": {"name": "awq"}}, "h2", "none"),
        Model("base-lora", "base-lora", "d", {"quant": {"name": "none"}}, "h3", "lora"),
    ]
    answers = {m.label: {q.question_id: ["a", "b"] for q in questions} for m in models}
    begun = Study.begin(tmp_path / "study", Material(questions, models, answers), raters=3)
    yield begun
    begun.close()


def grade_all(study: Study, rater: int, mildness: int = 0, but: int = 0) -> None:
    rows = [row for row in study.grades() if row.rater == rater]
    for row in rows[: len(rows) - but]:
        study.save(rater, row.position, GRADES[row.model] + mildness, "")


def run(study: Study, *words: object, mlflow: str = "none") -> Record:
    assert program.main([str(study.path.parent), *map(str, words), "--mlflow", mlflow]) == 0
    return store.load(study.path.parent)


def test_the_papers_tables_stand_beside_the_published_figures(study, capsys):
    grade_all(study, 1)
    grade_all(study, 2, mildness=1)
    grade_all(study, 3, mildness=-1)
    record = run(study)
    printed = capsys.readouterr().out
    second, fourth = printed.split("## Table IV")
    assert "60 of 60 grades; 0 are missing" in second
    # One resample in 27 has the strictest of three raters alone, and one the mildest.
    cells = "| 3.00 | 3.00 | 3.00 | 3.00 | 3.00 | 3.00 [2.00, 4.00] | -1.00 [-1.00, -1.00] |"
    assert f"| base-nf4 {cells}\n| *published: BnB* | 2.25 | 2 | 2.75 | 3.5 | 4 | 2.9 |  |" in second
    assert "*published: AWQ*" in second
    assert "*published: LoRA* | 2.5 | 2.25 | 0.75 | 3.75 | 3.25 | 2.5 |" in fourth
    assert "base-lora" not in second
    assert [record.quality[f"rater_bias/rater_{i}"].value for i in (1, 2, 3)] == [0, 1.5, -1.5]
    assert record.quality["human_grade/base"].n == 15
    assert (study.path.parent / "tables.md").read_text() in printed
    headings = [line for line in printed.splitlines() if line.startswith("## ")]
    assert len(headings) == len(set(headings))


def test_missing_grades_are_counted_and_shown(study, capsys):
    grade_all(study, 1)
    grade_all(study, 2, but=7)
    record = run(study)
    assert {key: record.counts[key] for key in ("grades_expected", "grades", "grades_missing")} == {
        "grades_expected": 60,
        "grades": 33,
        "grades_missing": 27,
    }
    assert (record.counts["raters_without_grades"], record.counts["raters_unfinished"]) == (1, 1)
    printed = capsys.readouterr().out
    assert "33 of 60 grades; 27 are missing: 1 raters have graded nothing, 1 a part." in printed
    shown = sum(int(n) for n in re.findall(r"\d \(n=(\d)\)", printed.split("## Agreement")[0]))
    assert shown == 33  # every cell of a question says of how few grades it is
    with (study.path.parent / "grades.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert (len(rows), sum(row["grade"] == "" for row in rows)) == (60, 27)


def test_without_a_grade_nothing_is_made_up(study, capsys):
    record = run(study)
    assert all(reading.value is None and reading.reason for reading in record.quality.values())
    assert record.counts["grades"] == 0
    own = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| base")]
    assert len(own) == 4
    assert not [line for line in own if re.search(r"\d\.\d", line)]


def test_one_rater_gives_means_and_no_interval(study, capsys):
    grade_all(study, 2)
    record = run(study)
    assert record.quality["human_grade/base"].value == 4
    assert all(reading.interval95 is None for reading in record.quality.values())
    assert record.quality["krippendorff_alpha"].value is None
    assert "one rater has graded: there are no intervals" in capsys.readouterr().out


def test_people_are_compared_with_a_judge_and_with_fidelity(study, capsys, tmp_path):
    for rater in (1, 2):
        grade_all(study, rater)
    judged = []
    for number, (model, grade) in enumerate(GRADES.items()):
        rows = [
            {"question_id": q, "model": model, "judge": ["j*udge", "single"], "turn": turn, "score": 2 * grade}
            for q in PAPERS
            for turn in (1, 2)
        ]
        folder = tmp_path / f"judge{number}"
        store.save(Record("evaluate", subject={"config_hash": f"h{number}"}), folder)
        (folder / "judgments.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        judged.append(folder)
    fidelity = []
    for number, quant in enumerate(("none", "nf4", "awq")):
        config = {"task": "fidelity", "quant": {"name": quant}}
        quality = {"kl_divergence_mean": Reading(0.1 * number, "nats/token", "m")}
        store.save(Record("evaluate", config=config, quality=quality), tmp_path / quant)
        fidelity.append(tmp_path / quant)
    record = run(study, "--judge", *judged, "--fidelity", *fidelity)
    assert record.quality["kendall_models/judge_j*udge"].value == pytest.approx(1)
    assert record.quality["spearman_models/kl_divergence_mean"].value == pytest.approx(-1)
    assert record.quality["spearman_answers/judge_j*udge"].n == 20
    assert record.counts["answers_without_score/j*udge"] == 0
    assert "| judge\\_j\\*udge | answers | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] | 20 |" in capsys.readouterr().out


def test_a_comment_is_no_formula_and_no_secret_is_exported(study):
    study.save(1, 1, 3, "=HYPERLINK(1)")
    run(study)
    folder = study.path.parent
    texts = {path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".csv", ".md", ".json")}
    assert set(texts) == {"grades.csv", "figures.csv", "tables.md", "record.json"}
    assert "'=HYPERLINK(1)" in texts["grades.csv"]
    assert study.secret not in "".join(texts.values())


@pytest.mark.slow
def test_from_inference_over_the_page_to_the_tables(command, tmp_path, capsys):
    for quant in ("none", "rtn"):
        done = command(
            "infer.py", f"quant={quant}", "limit=2", "engine.max_new_tokens=4", f"hydra.run.dir={tmp_path / quant}"
        )
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "study"
    words = [str(tmp_path / "none"), str(tmp_path / "rtn"), "--study", str(folder), "--raters", "2", "--port", "0"]
    server = subprocess.Popen(
        [sys.executable, "-m", "llm_at_home.human.serve", *words], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        lines = iter(server.stdout.readline, "")
        link = next(line.split()[2] for line in lines if line.startswith("rater"))
        for position in range(1, 5):
            with urllib.request.urlopen(f"{link}{position}") as page:
                token = re.search(r'name="form_token" value="([^"]+)"', page.read().decode())[1]
            form = urllib.parse.urlencode({"form_token": token, "grade": position, "comment": ""}).encode()
            urllib.request.urlopen(f"{link}{position}", form).close()
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=20)
    assert program.main([str(folder), "--mlflow", "none"]) == 0
    record = store.load(folder)
    assert {model["quant"]: model["adapter"] for model in record.config["models"]} == {"none": "none", "rtn": "none"}
    assert record.counts["grades"] == 4
    assert sum(record.quality[f"human_grade/{m['label']}"].value for m in record.config["models"]) == 5
    assert "Table II" in capsys.readouterr().out


@pytest.mark.slow
def test_it_is_in_mlflow(study, tmp_path):
    from mlflow.tracking import MlflowClient

    grade_all(study, 1)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    record = run(study, mlflow=uri)
    assert record.notes == [note for note in record.notes if "MLflow" not in note]
    client = MlflowClient(uri)
    (logged,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert logged.data.metrics["human_grade/base"] == 4
    assert logged.data.metrics["count_grades_missing"] == 40
    assert {one.path for one in client.list_artifacts(logged.info.run_id)} == {"record.json", "grades.csv", "tables.md"}


def test_a_folder_without_a_study_is_one_line(tmp_path, capsys):
    assert program.main([str(tmp_path), "--mlflow", "none"]) == 2
    assert capsys.readouterr().err == f"refused: {tmp_path} holds no study: `make rate RUNS=...` begins one\n"
    shutil.rmtree(tmp_path)
    assert program.main([str(tmp_path)]) == 2


def test_the_published_means_are_those_of_their_cells():
    rows = [published.human_grades(quant, "none") for quant in ("none", "nf4", "awq", "gptq")]
    pairs = [("none", "lora"), ("nf4", "lora"), ("none", "adalora"), ("nf4", "adalora"), ("none", "lokr")]
    rows += [published.human_grades(quant, adapter) for quant, adapter in pairs]
    assert [row["mean"] for row in rows] == [3.35, 2.9, 1.95, 3.1, 2.5, 2.0, 2.1, 1.6, 1.65]
    for row in rows:
        assert tuple(row["grades"]) == PAPERS
        assert sum(row["grades"].values()) / 5 == pytest.approx(row["mean"], abs=0.005)
    assert published.human_grades("gguf", "none") is None
