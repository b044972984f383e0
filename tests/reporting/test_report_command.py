"""The command and what it prints."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from llm_at_home.reporting import tables, terminal
from llm_at_home.reporting.__main__ import main
from llm_at_home.reporting.load import load


@pytest.fixture
def printed(runs):
    def show(width=100):
        stream = io.StringIO()
        loaded = load([runs])
        terminal.show(
            tables.build(loaded),
            loaded,
            runs / "index.html",
            Console(file=stream, width=width, force_terminal=True),
        )
        return stream.getvalue()

    return show


def test_the_command_writes_the_page_and_a_csv_a_table(make, save, runs, tmp_path, capsys):
    save(make.infer(), "a")
    save(make.train(), "t")
    out = tmp_path / "deep" / "reports"
    assert main([str(runs), "--out", str(out)]) == 0
    runs_of_every_kind = {"finetuning.csv", "inference.csv"}
    beside_the_paper = {f"table-{number}.csv" for number in (1, 2, 3, 4)} | {"fidelity-grades.csv"}
    assert {p.name for p in out.iterdir()} == {"index.html", "figures"} | runs_of_every_kind | beside_the_paper
    assert sorted(p.name for p in (out / "figures").iterdir()) == ["memory.csv", "memory.svg"]
    said = capsys.readouterr().out
    assert "smollm2_135m" in said
    assert str(out / "index.html") in said


def test_no_record_ends_in_one_line_and_exit_code_2(runs, capsys, tmp_path):
    runs.mkdir()
    assert main([str(runs), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "make demo" in said.err
    assert not (tmp_path / "out").exists()


def test_a_table_that_is_empty_now_leaves_no_old_csv(make, save, runs, tmp_path, capsys):
    failed = make.infer("f")
    failed.status = "failed"
    path = save(failed, "f")
    assert main([str(runs), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "unfinished.csv").exists()
    save(make.infer("f"), "f")
    assert path.exists()
    assert main([str(runs), "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "unfinished.csv").exists()


def test_an_unknown_value_has_a_numbered_note(make, save, printed):
    save(make.infer(), "a")
    said = Text.from_ansi(printed()).plain
    (note,) = (line for line in said.splitlines() if "powercap" in line)
    assert f"– {note.split()[0]}" in said


def test_hostile_names_are_printed_as_they_are(make, save, printed):
    record = make.infer(model="[red]x[/nope]")
    record.config["quant"] = {"name": "\x1b]0;owned\x07q"}
    save(record, "a")
    save("{broken", "[bold]bad")
    said = printed(160)
    assert "[red]x[/nope]" in said
    assert "\x1b]0;" not in said
    assert "[bold]bad" in said


def test_the_tables_fit_eighty_characters(make, save, printed):
    judged = make.infer("i")
    save(judged, "i")
    save(make.train(), "t")
    save(make.judge(judged, "j"), "j")
    long = {"name": "gptq_mixed", "target_bits": 3.5, "group_size": 64, "sym": True}
    save(make.fidelity("q", 0.5, long, dtype="bfloat16"), "q")
    lines = [Text.from_ansi(line).plain for line in printed(80).splitlines()]
    assert max(len(line.rstrip()) for line in lines[:-1]) <= 80
    assert any("smollm2_135m" in line and "25.3" in line for line in lines)
