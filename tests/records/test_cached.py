"""What is costly is made once, whole or not at all."""

from __future__ import annotations

import json
import multiprocessing
import time

import pytest

from llm_at_home.records.cached import KEY, cached, cached_folder, is_made, key_hash


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_AT_HOME_CACHE", str(tmp_path))


def test_it_is_made_once_and_says_from_what():
    calls = []

    def make(folder):
        calls.append(folder)
        (folder / "data").write_text("whole")

    key = {"bits": 4, "texts": "abc"}
    first = cached("kind", key, make)
    assert cached("kind", key, make) == first
    assert len(calls) == 1
    assert (first / "data").read_text() == "whole"
    assert json.loads((first / KEY).read_text()) == key


def test_another_key_is_another_result():
    assert key_hash({"a": 1, "b": 2}) == key_hash({"b": 2, "a": 1})
    assert key_hash({"a": 1}) != key_hash({"a": 2})


def test_an_interruption_leaves_nothing():
    def make(folder):
        (folder / "data").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("kind", {"a": 1}, make)
    assert not is_made("kind", {"a": 1})
    assert [path.suffix for path in cached_folder("kind", {"a": 1}).parent.iterdir()] == [".lock"]


def test_what_a_killed_process_left_is_removed():
    folder = cached_folder("kind", {"a": 1})
    left = folder.with_name(f"{folder.name}.tmp-999999")
    left.mkdir(parents=True)
    cached("kind", {"a": 1}, lambda made: (made / "data").touch())
    assert not left.exists()


def _slow(log):
    def make(folder):
        with log.open("a") as file:
            file.write("made\n")
        time.sleep(0.3)

    cached("kind", {"a": 1}, make)


def test_two_processes_make_it_once(tmp_path):
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_slow, args=(log,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert log.read_text() == "made\n"
