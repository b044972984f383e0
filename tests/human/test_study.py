"""The study's file: orders, grades that are never lost, and what a killed or hindered writer leaves."""

from __future__ import annotations

import dataclasses
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from llm_at_home.errors import Refusal
from llm_at_home.human import study as study_file
from llm_at_home.human.runs import read_material
from llm_at_home.human.study import DATABASE, Study


@pytest.fixture
def study(make_run, tmp_path):
    material = read_material([make_run(name, count=4) for name in ("none", "nf4", "gptq")])
    begun = Study.begin(tmp_path / "study", material, raters=3)
    yield begun
    begun.close()


def order(study: Study, rater: int) -> list[tuple[int, str]]:
    return [(row.question_id, row.model) for row in study.grades() if row.rater == rater]


def test_every_rater_sees_every_answer_once_question_by_question_in_an_order_of_his_own(study):
    orders = [order(study, rater) for rater in (1, 2, 3)]
    everything = {(q.question_id, m.label) for q in study.questions() for m in study.models()}
    assert all(len(one) == 12 and set(one) == everything for one in orders)
    assert len({tuple(one) for one in orders}) == 3
    for one in orders:
        questions = [question for question, _ in one]
        assert [questions[i] for i in range(0, 12, 3)] == list(dict.fromkeys(questions))
        # Answers do not stand in one order under every question.
        assert len({tuple(model for _, model in one[i : i + 3]) for i in range(0, 12, 3)}) > 1


def test_the_order_depends_on_seed_and_rater_alone(study, make_run, tmp_path):
    runs = [tmp_path / "runs" / name for name in ("none", "nf4", "gptq")]
    again = Study.begin(tmp_path / "again", read_material(runs), raters=5)
    other = Study.begin(tmp_path / "other", read_material(runs), raters=3, seed=1)
    study.add_raters(5)
    assert [order(again, rater) for rater in range(1, 6)] == [order(study, rater) for rater in range(1, 6)]
    assert order(other, 1) != order(study, 1)


def test_a_page_holds_both_turns_and_where_the_rater_is(study):
    page = study.page(1, 5)
    row = next(row for row in study.grades() if (row.rater, row.position) == (1, 5))
    asked = next(q.turns for q in study.questions() if q.question_id == row.question_id)
    assert page.turns == list(zip(asked, study.answers()[row.model, row.question_id], strict=True))
    assert (page.item.question_number, page.item.answer_number) == (2, 2)
    assert (page.questions, page.answers, page.items, page.graded) == (4, 3, 12, 0)
    assert study.page(1, 0) is None
    assert study.page(1, 13) is None


def test_the_last_grade_counts_and_no_earlier_one_is_thrown_away(study):
    assert study.save(1, 4, 2, "") == 1
    assert study.save(1, 4, 5, "better than I thought") == 1
    assert study.save(1, 4, 5, "better than I thought") == 1  # sent again, because the reply was lost
    item = study.page(1, 4).item
    assert (item.grade, item.comment) == (5, "better than I thought")
    with sqlite3.connect(study.path) as file:
        assert [row[0] for row in file.execute("SELECT grade FROM grade ORDER BY entry")] == [2, 5]
    assert study.page(2, 4).item.grade is None


def test_a_comment_alone_is_kept_and_is_no_grade(study):
    assert study.save(1, 1, None, "what is asked here?") == 0
    assert study.page(1, 1).item.comment == "what is asked here?"
    assert study.save(1, 1, 3, "what is asked here?") == 1
    assert study.save(1, 1, None, "") == 1
    assert (study.page(1, 1).item.grade, study.page(1, 1).item.comment) == (3, "")


def test_a_grade_outside_the_scale_or_of_no_item_never_gets_in(study):
    for position, grade in ((1, 6), (1, 0), (99, 3)):
        with pytest.raises(sqlite3.IntegrityError):
            study.save(1, position, grade, "")
    assert all(row.grade is None for row in study.grades())
    study.save(1, 1, 3, "")  # the connection is still good


def test_what_another_process_sees_is_on_disk_before_save_returns(study):
    study.save(2, 3, 4, "kept")
    code = "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute('SELECT grade FROM last_grade').fetchall())"
    seen = subprocess.run([sys.executable, "-c", code, str(study.path)], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[(4,)]"
    settings = [study._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert settings == ["wal", 2]  # 2 is FULL


def test_a_grade_that_cannot_be_written_raises_and_leaves_everything_as_it_was(study, monkeypatch):
    study.save(1, 1, 2, "")
    monkeypatch.setattr(study_file, "BUSY_TIMEOUT_S", 0.1)
    hindered = Study(study.path.parent)
    with sqlite3.connect(study.path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            hindered.save(1, 1, 5, "")
        other.execute("ROLLBACK")
    assert hindered.page(1, 1).item.grade == 2
    hindered.save(1, 1, 5, "")
    assert study.page(1, 1).item.grade == 5


def test_nobody_else_on_the_machine_can_read_the_secret(study):
    for path in study.path.parent.glob(f"{DATABASE}*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_study_that_could_not_be_begun_leaves_nothing_in_the_way(make_run, tmp_path):
    material = read_material([make_run("none")])
    twice = dataclasses.replace(material, models=material.models * 2)
    with pytest.raises(sqlite3.IntegrityError):
        Study.begin(tmp_path / "study", twice, raters=1)
    assert list((tmp_path / "study").iterdir()) == []
    begun = Study.begin(tmp_path / "study", material, raters=1)
    assert {path.name for path in (tmp_path / "study").iterdir()} <= {DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm"}
    begun.close()


def test_a_study_is_not_begun_twice_and_a_broken_file_is_no_study(study, tmp_path):
    runs = [tmp_path / "runs" / "none"]
    with pytest.raises(Refusal, match="holds a study already"):
        Study.begin(study.path.parent, read_material(runs), raters=1)
    with pytest.raises(Refusal, match="holds no study"):
        Study(tmp_path)
    (tmp_path / DATABASE).write_bytes(b"something else entirely" * 100)
    with pytest.raises(Refusal, match="cannot be"):
        Study(tmp_path)
    with pytest.raises(Refusal, match="--raters 0"):
        Study.begin(Path(tmp_path / "none"), read_material(runs), raters=0)
