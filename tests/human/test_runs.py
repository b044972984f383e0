"""What a study is made of: runs, their questions, and what does not go together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_at_home.data.questions import load_questions
from llm_at_home.errors import Refusal
from llm_at_home.human.runs import read_material
from llm_at_home.records import store
from llm_at_home.records.schema import Record


def drop_question(run: Path, question_id: int) -> None:
    path = run / "answers.jsonl"
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["question_id"] != question_id]
    path.write_text("\n".join(kept) + "\n")


def test_runs_are_read_with_the_questions_that_their_records_name(make_run):
    material = read_material([make_run("none"), make_run("nf4")])
    asked = load_questions("home_bench", limit=3)
    assert [(q.question_id, q.turns) for q in material.questions] == [(q.question_id, q.turns) for q in asked]
    assert [(m.label, m.adapter, m.config_hash) for m in material.models] == [
        ("tiny-none", "none", "hash-none"),
        ("tiny-nf4", "none", "hash-nf4"),
    ]
    assert material.answers["tiny-nf4"][asked[1].question_id][1].startswith("Reply 2 to")
    assert material.left_out == 0


def test_an_adapter_is_called_what_its_training_run_calls_it(make_run, tmp_path):
    trained = tmp_path / "trained"
    store.save(Record("train", config={"adapter": {"name": "lokr"}}), trained)
    tuned = make_run("tuned", adapter_path=str(trained))
    gone = make_run("other", adapter_path=str(tmp_path / "gone"))
    assert [m.adapter for m in read_material([make_run("none"), tuned, gone]).models] == ["none", "lokr", "gone"]


def test_questions_are_chosen_by_id_and_limit(make_run):
    runs = [make_run("none"), make_run("nf4")]
    ids = [q.question_id for q in load_questions("home_bench", limit=3)]
    assert [q.question_id for q in read_material(runs, ids=[ids[2], ids[0]]).questions] == [ids[2], ids[0]]
    assert [q.question_id for q in read_material(runs, limit=1).questions] == ids[:1]
    with pytest.raises(Refusal, match="were not asked question 9999"):
        read_material(runs, ids=[9999])


def test_a_question_that_one_run_did_not_answer_is_left_out_and_counted_or_refused_when_named(make_run):
    whole, short = make_run("none"), make_run("nf4")
    lacking = load_questions("home_bench", limit=3)[1].question_id
    drop_question(short, lacking)
    material = read_material([whole, short])
    assert lacking not in [q.question_id for q in material.questions]
    assert (len(material.questions), material.left_out) == (2, 1)
    with pytest.raises(Refusal, match=f"whole answer to question {lacking}"):
        read_material([whole, short], ids=[lacking])


def test_two_runs_of_one_model_are_told_apart_by_their_folders(make_run, tmp_path):
    one, other = make_run("none"), make_run("nf4")
    text = (other / "answers.jsonl").read_text()
    (other / "answers.jsonl").write_text(text.replace("tiny-nf4", "tiny-none"))
    assert [m.label for m in read_material([one, other]).models] == ["tiny-none (none)", "tiny-none (nf4)"]


def test_answers_without_a_record_need_the_questions_named(make_run):
    run = make_run("none")
    (run / "record.json").unlink()
    with pytest.raises(Refusal, match="name them with --questions"):
        read_material([run / "answers.jsonl"])
    assert len(read_material([run / "answers.jsonl"], "home_bench").questions) == 3


def test_runs_that_were_asked_different_things_under_one_id_are_refused(make_run, tmp_path):
    first = load_questions("home_bench", limit=1)[0]
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"question_id": first.question_id, "category": "math", "turns": ["a", "b"]}) + "\n")
    mine = make_run("mine", count=1, questions={"source": "path", "path": str(file)})
    with pytest.raises(Refusal, match=f"question {first.question_id} of .* another one"):
        read_material([make_run("none"), mine])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"question_id": 1, "model_id": "m", "choices": []}', "no answer in FastChat's format"),
        ("", "answers of 0 models"),
    ],
)
def test_a_file_that_holds_no_answers_is_refused(make_run, line, said):
    run = make_run("none")
    (run / "answers.jsonl").write_text(line + "\n")
    with pytest.raises(Refusal, match=said):
        read_material([run])


def test_a_folder_without_answers_and_a_run_named_twice_are_refused(make_run, tmp_path):
    with pytest.raises(Refusal, match=r"holds no record\.json"):
        read_material([tmp_path])
    run = make_run("none")
    with pytest.raises(Refusal, match="named twice"):
        read_material([run, run])


def test_the_order_in_which_runs_are_named_makes_no_other_study(make_run):
    one, other = make_run("none"), make_run("nf4")
    assert read_material([one, other]).fingerprint() == read_material([other, one]).fingerprint()
    assert read_material([one]).fingerprint() != read_material([one, other]).fingerprint()
