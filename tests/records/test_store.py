from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llm_at_home.errors import Refusal
from llm_at_home.records import store
from llm_at_home.records.__main__ import main
from llm_at_home.records.schema import SCHEMA_VERSION, Reading, Record

HASH = "0123456789abcdef"


def record(**changes) -> Record:
    return Record(**({"task": "infer", "config_hash": HASH, "config": {"seed": 1}} | changes))


def finished(folder: Path, root: Path, **changes) -> Record:
    made = record(**changes)
    store.save(made, folder)
    store.mark_finished(made, folder, root)
    return made


def test_a_saved_record_is_loaded_as_it_was(tmp_path: Path) -> None:
    made = record(readings={"x": Reading(1.5, "s", "clock", interval95=(1.0, 2.0), n=2)}, notes=["größe"])
    store.save(made, tmp_path / "new" / "run")
    assert store.load(str(tmp_path / "new" / "run")) == made
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["record.json"]


def test_writing_fails_before_the_old_file_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(record(), tmp_path)
    before = (tmp_path / "record.json").read_bytes()

    def half(self: Path, text: str, **options) -> None:
        with self.open("w") as file:
            file.write(text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        store.save(record(status="failed"), tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "record.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1, "no temporary file stays"


def test_a_config_with_infinity_still_gives_a_record_in_plain_json(tmp_path: Path) -> None:
    store.save(record(config={"clip": [float("inf"), {"x": float("nan")}], "path": Path("/a")}), tmp_path)

    def refuse(word: str):
        raise AssertionError(f"{word} is no JSON")

    data = json.loads((tmp_path / "record.json").read_text(), parse_constant=refuse)
    assert data["config"] == {"clip": ["inf", {"x": "nan"}], "path": "/a"}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        '{"status": "ok"}',
        '{"task": "infer", "status": "fine"}',
        '{"task": "infer", "readings": []}',
        '{"task": "infer", "readings": {"x": 3}}',
        '{"task": "infer", "readings": {"x": {"value": null, "unit": "s", "method": "m"}}}',
        f'{{"task": "infer", "schema_version": {SCHEMA_VERSION + 1}}}',
    ],
)
def test_what_is_no_record_is_refused_with_its_path(tmp_path: Path, content: str) -> None:
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(Refusal, match=r"record\.json cannot be read as a record"):
        store.load(tmp_path)


def test_a_folder_without_a_record_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(Refusal, match=r"holds no record\.json: give the folder of a finished run"):
            store.load(folder)


def test_a_skipped_runs_pointer_leads_to_the_finished_run(tmp_path: Path) -> None:
    made = finished(tmp_path / "first", tmp_path)
    store.write_json(tmp_path / "second" / store.POINTER, {"folder": str(tmp_path / "first")})
    assert store.run_folder(tmp_path / "second") == tmp_path / "first"
    assert store.load(tmp_path / "second") == made
    shutil.rmtree(tmp_path / "first")
    with pytest.raises(Refusal, match="rerun=true"):
        store.load(tmp_path / "second")


@pytest.mark.parametrize("content", ["", "[]", '{"other": 1}', '{"folder": 3}'])
def test_a_broken_pointer_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / store.POINTER).write_text(content)
    with pytest.raises(Refusal):
        store.load(tmp_path)


def test_the_index_finds_a_finished_run_by_its_hash(tmp_path: Path) -> None:
    finished(tmp_path / "run", tmp_path)
    assert store.find_finished(HASH, tmp_path) == tmp_path / "run"
    assert store.find_finished("another", tmp_path) is None
    assert store.find_finished(HASH, tmp_path / "elsewhere") is None


def test_the_index_names_folders_that_hold_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finished(Path("run"), Path("."))
    monkeypatch.chdir("/")
    assert store.find_finished(HASH, tmp_path) == tmp_path / "run"


def test_a_deleted_folder_is_not_finished_and_can_be_entered_again(tmp_path: Path) -> None:
    finished(tmp_path / "run", tmp_path)
    shutil.rmtree(tmp_path / "run")
    assert store.find_finished(HASH, tmp_path) is None
    finished(tmp_path / "again", tmp_path)
    assert store.find_finished(HASH, tmp_path) == tmp_path / "again"


@pytest.mark.parametrize("changes", [{"config_hash": "fedcba9876543210"}, {"status": "failed"}])
def test_a_folder_that_another_run_has_taken_is_not_finished(tmp_path: Path, changes: dict) -> None:
    finished(tmp_path / "run", tmp_path)
    store.save(record(**changes), tmp_path / "run")
    assert store.find_finished(HASH, tmp_path) is None


@pytest.mark.parametrize("content", ["", "[]", '{"other": 1}'])
def test_a_broken_index_entry_means_run_it_again(tmp_path: Path, content: str) -> None:
    finished(tmp_path / "run", tmp_path)
    (tmp_path / store.INDEX / f"{HASH}.json").write_text(content)
    assert store.find_finished(HASH, tmp_path) is None


# -- python -m llm_at_home.records show


def test_show_prints_figures_methods_reasons_and_the_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = record(
        status="failed",
        readings={"decode_tokens_per_second": Reading(12.3456789, "tokens/s", "clock", interval95=(12.0, 13.0), n=5)},
        quality={"exact_match": Reading.unknown("1", "the test split has no such question")},
        kernel={"Linear": 3},
        error={"type": "ValueError", "message": "it broke"},
        notes=["MLflow: gone"],
    )
    store.save(made, tmp_path)
    assert main(["show", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for expected in (
        f"infer: failed  (config {HASH})",
        "12.3457 tokens/s [12, 13]  (clock, n=5)",
        "unknown: the test split has no such question",
        "Linear",
        "ValueError: it broke",
        "note: MLflow: gone",
    ):
        assert expected in out


def test_show_refuses_a_missing_folder_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tmp_path / "missing")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("refused: ")
    assert captured.err.count("\n") == 1


def test_show_as_a_command(tmp_path: Path) -> None:
    import subprocess
    import sys

    store.save(record(), tmp_path)
    words = [sys.executable, "-m", "llm_at_home.records", "show"]
    found = subprocess.run([*words, str(tmp_path)], capture_output=True, text=True)
    assert (found.returncode, found.stdout.splitlines()[0]) == (0, f"infer: ok  (config {HASH})")
    missing = subprocess.run([*words, str(tmp_path / "no")], capture_output=True, text=True)
    assert missing.returncode == 2
    assert "Traceback" not in missing.stderr


def test_what_differs_between_two_runs_is_told(tmp_path, capsys):
    def run(folder, quant, speed):
        reading = Reading(speed, "tokens/s", "token_on_host_clock")
        record = Record(task="infer", config={"quant": {"name": quant}, "seed": 0}, provenance={"git": {"commit": "a"}})
        record.readings = {"decode_tokens_per_second": reading, "energy_gross": Reading.unknown("Wh", "no counter")}
        store.save(record, tmp_path / folder)
        return str(tmp_path / folder)

    assert main(["diff", run("a", "none", 20.0), run("b", "nf4", 30.0)]) == 0
    told = capsys.readouterr().out
    assert "config.quant.name" in told
    assert "none  |  nf4" in told
    assert "(x 1.5)" in told
    assert "unknown: no counter" in told
    assert "seed" not in told
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "nowhere")]) == 2
