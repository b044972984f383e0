"""Finding and reading records."""

import json

import pytest

from llm_at_home.errors import Refusal
from llm_at_home.reporting.load import load


def test_records_are_found_at_any_depth_and_once(make, save, runs):
    save(make.infer("a"), "2026-11-20/10-00-00")
    save(make.infer("b"), "sweep/3/deep/down")
    loaded = load([runs, runs / "sweep"])
    assert sorted(run.record.config_hash for run in loaded.runs) == ["a", "b"]
    assert not loaded.superseded


def test_a_finished_run_is_not_hidden_by_making_it_again_and_breaking_off(make, save, runs):
    save(make.infer("same", started_at="2026-11-20T09:00:00+01:00"), "finished")
    broken = make.infer("same", started_at="2026-11-21T09:00:00+01:00")
    broken.status = "interrupted"
    save(broken, "broken-off")
    loaded = load([runs])
    assert [run.path.parent.name for run in loaded.runs] == ["finished"]
    assert [run.path.parent.name for run in loaded.superseded] == ["broken-off"]


def test_the_newest_of_one_config_wins_whatever_the_order_of_folders(make, save, runs):
    save(make.infer("same", started_at="2026-11-21T09:00:00+01:00", decode=30.0), "a-newest")
    save(make.infer("same", started_at="2026-11-20T10:00:00+00:00", decode=20.0), "z-oldest")
    loaded = load([runs])
    assert [run.path.parent.name for run in loaded.runs] == ["a-newest"]
    assert [run.path.parent.name for run in loaded.superseded] == ["z-oldest"]


def test_records_without_a_hash_are_nobodys_duplicates(make, save, runs):
    save(make.infer(""), "a")
    save(make.infer(""), "b")
    assert len(load([runs]).runs) == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{broken", "not JSON"),
        ("", "not JSON"),
        ("[1, 2]", "not a run record"),
        ('{"task": "infer", "colour": 1}', "unknown keys"),
        ('{"status": "ok"}', "not a run record"),
        ('{"task": "infer", "status": "splendid"}', "splendid"),
        ('{"task": "infer", "provenance": [1]}', "not a run record"),
        ('{"task": "infer", "readings": {"x": {"value": NaN, "unit": "s", "method": "m"}}}', "no reading"),
        (
            '{"task": "infer", "readings": {"x": {"value": "9", "unit": "s", "method": "m"}}}',
            "not a run record",
        ),
    ],
)
def test_what_cannot_be_read_is_listed_and_the_rest_stays(make, save, runs, content, reason):
    save(make.infer("good"), "good")
    bad = save(content, "bad")
    loaded = load([runs])
    assert [run.record.config_hash for run in loaded.runs] == ["good"]
    assert [file.path for file in loaded.left_out] == [bad]
    assert reason in loaded.left_out[0].reason
    assert "\n" not in loaded.left_out[0].reason


def test_a_newer_schema_is_listed_as_such(make, save, runs):
    data = make.infer().to_dict() | {"schema_version": 99, "something_new": 1}
    save(json.dumps(data), "newer")
    loaded = load([runs])
    assert not loaded.runs
    assert "newer" in loaded.left_out[0].reason


def test_bytes_that_are_no_text_are_listed(make, save, runs):
    save("x", "bytes").write_bytes(b"\xff\xfe\x00{")
    assert len(load([runs]).left_out) == 1


def test_no_record_is_refused_with_the_command_that_makes_one(runs):
    runs.mkdir()
    with pytest.raises(Refusal, match="make demo") as refused:
        load([runs])
    assert "\n" not in str(refused.value)


def test_a_named_folder_must_exist_but_a_default_one_need_not(make, save, runs, tmp_path, monkeypatch):
    save(make.infer(), "a")
    monkeypatch.chdir(tmp_path)
    assert len(load(["multirun", "results"]).runs) == 1
    with pytest.raises(Refusal, match="nowhere"):
        load(["multirun", "nowhere"])
