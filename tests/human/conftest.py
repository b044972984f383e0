"""Runs with answers as ``infer.py`` leaves them, and the rating page's own server as `make rate` starts it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llm_at_home.data.questions import load_questions
from llm_at_home.records import store
from llm_at_home.records.schema import Record

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"^rater +(\d+)  (http\S+/r/\S+/)  ", re.MULTILINE)

MakeRun = Callable[..., Path]


def write_run(runs: Path, name: str, count: int = 3, texts: dict[int, list[str]] | None = None, **config: Any) -> Path:
    """A finished run over the first of the shipped questions; ``texts`` are its answers to some of them."""
    folder = runs / name
    folder.mkdir(parents=True)
    with (folder / "answers.jsonl").open("w") as file:
        for question in load_questions("home_bench", limit=count):
            number = sum(map(ord, name))
            said = [f"Reply {turn} to question {question.question_id}, number {number}." for turn in (1, 2)]
            row = {
                "question_id": question.question_id,
                "answer_id": f"secret-answer-{name}",
                "model_id": f"tiny-{name}",
                "choices": [{"index": 0, "turns": (texts or {}).get(question.question_id, said)}],
                "tstamp": 0.0,
            }
            file.write(json.dumps(row) + "\n")
    asked = {"source": "home_bench", "path": None, "ids": None, "references": None}
    whole = {"model": {"name": "tiny"}, "quant": {"name": name}, "adapter_path": None, "questions": asked, **config}
    store.save(Record("infer", config=whole, config_hash=f"hash-{name}"), folder)
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run("nf4", count=3, texts={question_id: ["...", "..."]}, **config)``."""
    return partial(write_run, tmp_path / "runs")


class Server:
    """``make rate`` in a process of its own; ``links[n]`` is rater n's."""

    def __init__(self, study: Path, *words: str) -> None:
        self.study = study
        self.command = [sys.executable, "-m", "llm_at_home.human.serve", "--study", str(study), *words]
        self.port = 0
        self.start()

    def start(self) -> None:
        """Begin, or go on after :meth:`kill` on the same port."""
        self.process = subprocess.Popen(
            [*self.command, "--port", str(self.port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        )
        assert self.process.stdout is not None
        self.printed = ""
        while "Ctrl-C stops" not in self.printed:
            line = self.process.stdout.readline()
            assert line, f"the server ended: {self.process.communicate()[1]}"
            self.printed += line
        self.links = {int(rater): link for rater, link in LINK.findall(self.printed)}
        self.port = int(self.links[1].split(":")[2].split("/")[0])

    def kill(self) -> None:
        """SIGKILL: nothing is put in order."""
        self.process.kill()
        self.process.communicate()

    def stop(self) -> tuple[str, str]:
        """Ctrl-C, and what was printed from then on."""
        self.process.send_signal(2)
        return self.process.communicate(timeout=20)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """``serve(run, run, "--raters", "2")`` over the study in ``tmp_path / "study"``."""
    servers = []

    def begin(*words: Any) -> Server:
        servers.append(Server(tmp_path / "study", *map(str, words)))
        return servers[-1]

    yield begin
    for server in servers:
        if server.process.poll() is None:
            server.kill()
