"""The judge's commands as a user runs them: what is refused, what a dry run prints, answers out of a file."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from llm_at_home.data.mt_bench import is_fetched
from llm_at_home.errors import Refusal
from llm_at_home.evaluation.__main__ import main
from llm_at_home.records import hashing, store
from llm_at_home.records.jsonl import read_jsonl
from llm_at_home.records.schema import Record
from llm_at_home.tasks import evaluate, judging, resolve

ROOT = Path(__file__).resolve().parents[2]
SERVER = ("judge=server", "judge.model=m", "judge.cache=false")


def resolved(*words: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return resolve.resolve("evaluate", compose("evaluate", ["gpu=cpu", "logger=none", *words]), words)


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    """Templates with a place for everything."""
    path = tmp_path / "judge_prompts.jsonl"
    stems = ("single-v1", "single-math-v1", "pair-v2", "pair-math-v1")
    rows = [
        {"name": stem + turn, "system_prompt": "Judge.", "prompt_template": f"{stem}{turn}"}
        for stem in stems
        for turn in ("", "-multi-turn")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def server():
    """A judge that gives everything a 7, and an assistant that says so."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            outer.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Rating: [[7]]"}}
            body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    outer: list[dict] = []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    http.bodies, http.base_url = outer, f"http://127.0.0.1:{http.server_address[1]}/v1"
    yield http
    http.shutdown()
    http.server_close()


@pytest.fixture
def answers(server, tmp_path: Path, capsys) -> Path:
    """A model's answers, asked for through its API; the last two questions came in a second call."""
    out = tmp_path / "answers.jsonl"
    words = [
        "answers",
        "--base-url",
        server.base_url,
        "--model",
        "bound",
        "--out",
        str(out),
        "--questions",
        "home_bench",
    ]
    assert main([*words, "--limit", "3"]) == 0
    assert main([*words, "--limit", "5"]) == 0
    assert "2 questions answered by bound, 3 were there" in capsys.readouterr().out
    return out


def test_answers_through_an_api_are_in_fastchat_s_fields_at_the_published_temperatures(server, answers) -> None:
    rows = list(read_jsonl(answers))
    assert [len(row["choices"][0]["turns"]) for row in rows] == [2] * 5
    assert {"question_id", "answer_id", "model_id", "choices", "tstamp"} <= set(rows[0])
    assert len(server.bodies) == 10
    assert server.bodies[0]["temperature"] == 0.7, "the first question is one of writing"
    second = server.bodies[1]["messages"]
    assert [message["role"] for message in second] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"--model": "another"}, "holds answers of bound: give another file"),
        ({"--samples": "0"}, "--samples 0 is too small"),
        ({"--max-tokens": "0"}, "--max-tokens 0 is too small"),
        ({"--base-url": "127.0.0.1:8080/v1"}, "give http://HOST:PORT/v1"),
    ],
)
def test_answers_that_would_be_no_row_are_refused(server, answers, capsys, changed, says) -> None:
    before = answers.read_bytes()
    options = {"--base-url": server.base_url, "--model": "bound", "--out": str(answers), "--questions": "home_bench"}
    assert main(["answers", *(word for pair in (options | changed).items() for word in pair)]) == 2
    assert says in capsys.readouterr().err
    assert answers.read_bytes() == before


def test_any_model_s_answers_can_be_a_row(server, answers, templates, tmp_path) -> None:
    words = (*SERVER, f"judge.base_url={server.base_url}", f"judge.templates={templates}", f"answers={answers}")
    config = resolved(*words, "questions=home_bench", "limit=4")
    resolve.check("evaluate", config)
    record = Record("evaluate", config=config)
    evaluate.run(config, tmp_path / "run", record, None)
    assert record.subject["models"] == ["bound"]
    assert record.quality["judge_score_mean"].value == 7
    assert record.counts["judgments"] == 8
    assert record.readings["judge_cost"].value is None
    assert "the same score" in record.notes[0]


def test_a_file_s_questions_must_be_named(answers, server, templates) -> None:
    words = (*SERVER, f"judge.base_url={server.base_url}", f"judge.templates={templates}")
    for more, says in (
        ((f"answers={answers}",), "which questions"),
        (("task=judge_check",), "which questions"),
        ((f"answers={answers}", "questions=synthetic"), "random ids"),
        (("questions=home_bench",), "answers=RUN_FOLDER"),
        ((f"answers=[{answers},{answers}]", "questions=home_bench"), "all_pairs"),
        (("task=judge_check", f"answers={answers}", "questions=home_bench"), "baseline=OTHER_SEED"),
    ):
        with pytest.raises(Refusal, match=says):
            resolve.check("evaluate", resolved(*words, *more))


def test_a_dry_run_prints_and_leaves_nothing(answers, server, templates, tmp_path, command) -> None:
    words = (*SERVER, f"judge.base_url={server.base_url}", f"judge.templates={templates}", f"answers={answers}")
    asked = len(server.bodies)
    done = command(
        "evaluate.py",
        *words,
        "questions=home_bench",
        "judge.dry_run=true",
        f"hydra.run.dir={tmp_path}/dry",
        model=False,
    )
    assert done.returncode == 0, done.stderr
    assert "calls: 10" in done.stdout
    assert not (tmp_path / "dry" / "record.json").exists()
    assert len(server.bodies) == asked


def test_limits_and_the_cache_do_not_change_a_hash_and_the_judge_does(answers, server, templates) -> None:
    def digest(*more: str) -> str:
        words = (*SERVER, f"judge.base_url={server.base_url}", f"judge.templates={templates}", f"answers={answers}")
        config = resolved(*words, "questions=home_bench", *more)
        return hashing.config_hash(config, resolve.ingredients("evaluate", config))

    same = digest()
    assert digest("judge.requests_per_minute=5", "judge.cache=true", "judge.max_cost_usd=null") == same
    assert digest("judge.model=other") != same
    assert digest("judge.repeats=2") != same


def test_one_model_under_two_seeds(tmp_path) -> None:
    config = {"model": {"name": "m"}, "quant": {"name": "none"}, "seed": 0}
    for name, change in (("a", {}), ("b", {"seed": 1}), ("c", {"seed": 1, "quant": {"name": "nf4"}})):
        store.save(Record("infer", config=config | change), tmp_path / name)
    assert judging.differ_in_seed_alone(str(tmp_path / "a"), str(tmp_path / "b"))
    assert not judging.differ_in_seed_alone(str(tmp_path / "a"), str(tmp_path / "c"))
    assert not judging.differ_in_seed_alone(str(tmp_path / "a"), str(tmp_path / "a"))


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the harness is installed")
def test_without_the_harness_its_task_is_refused_in_one_line() -> None:
    with pytest.raises(Refusal, match=r'pip install "llm-at-home\[harness\]"'):
        resolve.check("evaluate", resolved("task=harness"))


HARNESS = (
    *("lm_eval==0.4.13", "evaluate", "pytablewriter", "DataProperty", "mbstrdecoder", "pathvalidate", "tabledata"),
    *(
        "tcolorpy",
        "typepy",
        "rouge-score",
        "sacrebleu",
        "portalocker",
        "tabulate",
        "colorama",
        "lxml",
        "nltk",
        "absl-py",
    ),
    *("sqlitedict", "word2number", "scikit-learn", "threadpoolctl", "joblib"),
)


@pytest.mark.slow
def test_the_harness_scores_the_loaded_model_on_a_task_of_one_s_own(tmp_path, command) -> None:
    packages = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages), *HARNESS]
    subprocess.run(install, check=True, capture_output=True, timeout=600)
    capitals = [("France", 0), ("Germany", 1), ("Italy", 2)]
    rows = [{"country": name, "choices": ["Paris", "Berlin", "Rome"], "answer": answer} for name, answer in capitals]
    (tmp_path / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "capitals.yaml").write_text(
        f"task: capitals\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/capitals.jsonl\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: 'The capital of {{country}} is'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\nmetric_list:\n  - metric: acc\n"
    )
    words = (
        "task=harness",
        "harness.tasks=[capitals]",
        f"harness.include_path={tmp_path}",
        f"hydra.run.dir={tmp_path}/run",
    )
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(packages))))
    done = command("evaluate.py", *words, model=False, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    record = store.load(tmp_path / "run")
    accuracy = record.quality["capitals_acc"]
    assert accuracy.value == 1, "the embedded model knows these capitals"
    assert (accuracy.n, accuracy.method) == (3, "lm_eval 0.4.13")
    assert json.loads((tmp_path / "run" / "harness.json").read_text())["results"]["capitals"]
    done = command("evaluate.py", *words[:1], "harness.tasks=[no_such_task]", *words[2:], model=False, PYTHONPATH=path)
    assert done.returncode == 2
    assert "no_such_task" in done.stderr


@pytest.mark.skipif(not is_fetched(), reason="`make setup` fetches MT-bench's files")
def test_the_reference_set_is_a_choice_and_the_choice_is_in_the_record(server, tmp_path) -> None:
    file = tmp_path / "answers.jsonl"
    turns = [{"index": 0, "turns": ["42", "43"]}]
    file.write_text(json.dumps({"question_id": 111, "model_id": "m", "choices": turns}) + "\n")
    shown, digests = {}, {}
    for references in ("gpt-4", "gpt-4-0125-preview"):
        words = (*SERVER, f"judge.base_url={server.base_url}", f"answers={file}", "questions=mt_bench")
        config = resolved(*words, "questions.ids=[111]", f"judge.references={references}")
        record = Record("evaluate", config=config)
        evaluate.run(config, tmp_path / references, record, None)
        assert record.provenance["references"] == references
        shown[references] = server.bodies[-1]["messages"][1]["content"]
        digests[references] = resolve.ingredients("evaluate", config)["judge_questions"]
    assert shown["gpt-4"] != shown["gpt-4-0125-preview"]
    assert all("Reference Answer" in prompt for prompt in shown.values())
    assert digests["gpt-4"] != digests["gpt-4-0125-preview"]
