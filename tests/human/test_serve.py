"""`make rate`: what it prints, going on with a study, and what it refuses."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from llm_at_home.human import serve
from llm_at_home.human.study import Study

from .conftest import LINK, Server


@pytest.fixture
def announce(tmp_path, monkeypatch):
    """Everything up to the point where the server would run; gives what was printed on the way."""

    def run(capsys, *words: object) -> str:
        def instead(study, arguments):
            print(serve._announcement(study, arguments, "http://there"))

        monkeypatch.setattr(serve, "_serve", instead)
        code = serve.main(["--study", str(tmp_path / "study"), *map(str, words)])
        printed = capsys.readouterr()
        assert (code == 2) == printed.err.startswith("refused: "), printed
        assert printed.err.count("\n") <= 1
        return printed.out + printed.err

    return run


def test_it_goes_on_with_the_same_study_whether_the_runs_are_named_again_or_not(announce, make_run, capsys, tmp_path):
    runs = make_run("none"), make_run("nf4")
    first = announce(capsys, *runs, "--raters", 2)
    assert "2 models, 3 questions: 6 answers for each of 2 raters" in first
    assert "0 of 6 graded" in first
    study = Study(tmp_path / "study")
    study.save(2, 5, 4, "")
    study.close()
    again = announce(capsys, *runs)
    assert again == announce(capsys)
    assert LINK.findall(again) == LINK.findall(first)
    assert "1 of 6 graded" in again


def test_raters_can_be_added_and_not_taken_away(announce, make_run, capsys):
    run = make_run("none")
    before = announce(capsys, run, "--raters", 2)
    after = announce(capsys, "--raters", 3)
    assert len(LINK.findall(after)) == 3
    assert LINK.findall(before) == LINK.findall(after)[:2]
    assert "has 3 raters: there can be more and not fewer" in announce(capsys, "--raters", 2)


def test_another_study_in_the_same_folder_is_refused_in_one_line(announce, make_run, capsys):
    one, other = make_run("none"), make_run("nf4")
    announce(capsys, one)
    assert "is of other answers or questions" in announce(capsys, one, other)
    assert "is of other answers or questions" in announce(capsys, one, "--limit", 1)
    assert "are chosen already" in announce(capsys, "--limit", 1)
    assert "has the seed 0" in announce(capsys, "--seed", 1)
    changed = (one / "answers.jsonl").read_text().replace("Reply 1", "Another reply")
    (one / "answers.jsonl").write_text(changed)
    assert "is of other answers or questions" in announce(capsys, one)
    assert "1 models, 3 questions" in announce(capsys)  # what is graded is in the study itself


def test_what_cannot_be_served_is_refused(announce, make_run, capsys, tmp_path):
    assert 'make rate RUNS="FOLDER FOLDER"' in announce(capsys)
    assert "--limit 0 leaves no question" in announce(capsys, make_run("none"), "--limit", 0)
    assert "--raters 0" in announce(capsys, tmp_path / "runs" / "none", "--raters", 0)
    assert not (tmp_path / "study" / "study.sqlite").exists()


def test_another_address_than_loopback_is_said_to_be_open(announce, make_run, capsys):
    run = make_run("none")
    assert "Only this machine reaches 127.0.0.1" in announce(capsys, run)
    for host in ("0.0.0.0", "192.168.1.5", "::"):
        said = announce(capsys, "--host", host)
        assert f"WARNING: {host} is open to the network, and nothing is encrypted" in said
    for host in ("localhost", "::1", "127.0.0.2"):
        assert "WARNING" not in announce(capsys, "--host", host)


def test_links_behind_a_proxy_begin_with_its_address(make_run, serve):
    server: Server = serve(make_run("none"), "--raters", 1, "--url", "https://rate.example:443/")
    assert server.links[1].startswith("https://rate.example:443/r/")


def test_a_port_that_is_taken_or_an_address_of_another_machine_is_one_line(make_run, capsys, tmp_path):
    words = [str(make_run("none")), "--study", str(tmp_path / "study")]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main([*words, "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err
    assert serve.main([*words, "--host", "192.0.2.1", "--port", "0"]) == 2
    assert "cannot listen on 192.0.2.1" in capsys.readouterr().err
    assert serve.main([*words, "--port", "99999"]) == 2
    assert "99999" in capsys.readouterr().err


def test_the_secret_is_of_the_study(announce, make_run, capsys, tmp_path):
    run = make_run("none")
    one = announce(capsys, run)
    (tmp_path / "study" / "study.sqlite").rename(tmp_path / "kept.sqlite")
    for left in Path(tmp_path / "study").iterdir():
        left.unlink()
    assert len({link for _, link in LINK.findall(one + announce(capsys, run))}) == 16
