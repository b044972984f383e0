"""The copy in MLflow, against the real MLflow on sqlite."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llm_at_home.records import store
from llm_at_home.records.schema import Reading, Record
from llm_at_home.records.tracking import PARAMETER_LENGTH, Tracker, described, end_left, flatten

CONFIG: dict[str, Any] = {
    "seed": 0,
    "model": {"name": "tiny", "architecture": None, "empty": {}},
    "list": [1, 2],
    "blank": "",
    "long": "x" * 300 + "end",
    "longer": "".join(f"{i:05d}" for i in range(3000)),
    "many": {f"key{i}": i for i in range(150)},
}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests here: MLflow takes seconds to make one."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'sub' / 'mlflow.db'}"


def client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def whole_value(params: dict[str, str], name: str) -> str:
    if name in params:
        return params[name]
    parts = sorted((key for key in params if key.startswith(f"{name}.part")), key=lambda key: int(key.split("part")[1]))
    return "".join(params[key] for key in parts)


@pytest.fixture(scope="module")
def closed(uri: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that was opened, logged to and closed; MLflow's own view of it, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    record = Record(
        task="train",
        config_hash="0123456789abcdef",
        readings={"energy_gross": Reading.unknown("Wh", "no counter"), "steps_per_second": Reading(2.5, "1/s", "m")},
        quality={"exact_match": Reading(0.75, "1", "squad")},
        counts={"truncated": 3},
    )
    store.save(record, folder)
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "answers.jsonl").write_text("{}\n")
    (folder / "private.txt").write_text("not an artifact")
    tracker = Tracker(uri, "llm-at-home", "adapter=lora")
    tracker.open(CONFIG, {"model": "tiny", "quant": "none"})
    tracker.log_step({"loss": 2.0, "lr": 1e-4}, 1)
    tracker.log_step({"loss": math.inf, "gradient_norm": math.nan, "lr": 1e-4}, 2)
    tracker.log_step({"loss": math.inf}, 3)
    tracker.log_step({"loss": 1.5, "odd name (%)": 1.0}, 4)
    tracker.close(record, folder)
    assert tracker.problem is None
    assert tracker.run_id is not None
    return client(uri).get_run(tracker.run_id)


def test_every_parameter_arrives_whole(closed: Any) -> None:
    params = closed.data.params
    assert params["long"] == CONFIG["long"]
    assert len(CONFIG["longer"]) > 2 * PARAMETER_LENGTH
    assert whole_value(params, "longer") == CONFIG["longer"]
    assert {params[f"many.key{i}"] for i in range(150)} == {str(i) for i in range(150)}
    assert (params["model.name"], params["model.architecture"], params["model.empty"]) == ("tiny", "None", "{}")
    assert (params["list"], params["blank"]) == ("[1, 2]", "")


def test_readings_quality_and_counts_are_metrics_and_unknown_is_none_of_them(closed: Any) -> None:
    metrics = closed.data.metrics
    assert metrics["steps_per_second"] == 2.5
    assert metrics["exact_match"] == 0.75
    assert metrics["count_truncated"] == 3
    assert "energy_gross" not in metrics
    note = closed.data.tags["mlflow.note.content"]
    assert "| energy_gross | – | Wh | no counter |" in note
    assert "| steps_per_second | 2.5 | 1/s | m |" in note


def test_infinity_is_said_and_not_stored_as_a_figure(closed: Any, uri: str) -> None:
    history = client(uri).get_metric_history(closed.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.0), (4, 1.5)]
    assert closed.data.tags["infinite.loss"] == "inf at step 3"
    assert math.isnan(closed.data.metrics["gradient_norm"])
    assert len(client(uri).get_metric_history(closed.info.run_id, "lr")) == 2


def test_tags_status_and_artifacts(closed: Any, uri: str) -> None:
    tags = closed.data.tags
    assert (tags["model"], tags["quant"], tags["status"]) == ("tiny", "none", "ok")
    assert (tags["config_hash"], tags["mlflow.runName"]) == ("0123456789abcdef", "adapter=lora")
    assert closed.info.status == "FINISHED"
    files = {item.path for item in client(uri).list_artifacts(closed.info.run_id)}
    assert files == {"config.yaml", "record.json", "answers.jsonl"}
    assert (
        Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts"
        in Path(closed.info.artifact_uri.removeprefix("file://")).parents
    )


def test_a_run_that_did_not_end_well_is_failed_in_mlflow(uri: str, tmp_path: Path) -> None:
    tracker = Tracker(uri, "llm-at-home", "x")
    tracker.open({}, {})
    tracker.close(Record(task="infer", status="out_of_memory"), tmp_path)
    assert tracker.problem is None
    run = client(uri).get_run(tracker.run_id)
    assert (run.info.status, run.data.tags["status"]) == ("FAILED", "out_of_memory")


def test_a_process_that_died_leaves_no_run_that_seems_to_go_on(uri: str, tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from llm_at_home.records.tracking import Tracker\n"
        "tracker = Tracker(sys.argv[1], 'test', 'one'); tracker.open({}, {})\n"
        "tracker.leave(Path(sys.argv[2]))\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, uri, str(tmp_path)]).returncode == -9
    record = Record("infer", "out_of_memory", readings={"resident_set_peak": Reading(1.5, "GB", "sampled")})
    record.error = {"type": "ProcessDied", "message": "killed"}
    store.save(record, tmp_path)
    end_left(record, tmp_path)
    run = client(uri).get_run(json.loads((tmp_path / "mlflow.json").read_text())["run_id"])
    assert (run.info.status, run.data.tags["status"]) == ("FAILED", "out_of_memory")
    assert run.data.metrics == {"resident_set_peak": 1.5}
    end_left(record, tmp_path / "nowhere")


def test_a_refused_job_takes_its_run_back(uri: str) -> None:
    tracker = Tracker(uri, "llm-at-home", "refused")
    tracker.open({}, {})
    tracker.discard()
    assert client(uri).get_run(tracker.run_id).info.lifecycle_stage == "deleted"


CHILD = """
import sys, time
from pathlib import Path
from llm_at_home.records.schema import Record
from llm_at_home.records.tracking import Tracker
import mlflow.tracking
uri, sweep, name, folder = sys.argv[1:]
Path(folder, f"ready-{name}").touch()
while not Path(folder, "go").exists():
    time.sleep(0.002)
tracker = Tracker(uri, "sweeps", name, sweep)
tracker.open({"name": name}, {})
for step in range(20):
    tracker.log_step({"loss": 1.0}, step)
tracker.close(Record(task="train"), Path(folder))
sys.exit(tracker.problem)
"""


def test_two_jobs_that_start_together_make_the_store_once_and_share_one_parent(tmp_path: Path) -> None:
    fresh = f"sqlite:///{tmp_path}/mlflow.db"
    sweep = f"{tmp_path}/it's a sweep"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, fresh, sweep, name, str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        for name in ("a", "b")
    ]
    try:
        deadline = time.monotonic() + 100
        while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        (tmp_path / "go").touch()
        for child in children:
            _, errors = child.communicate(timeout=120)
            assert child.returncode == 0, errors[-2000:]
    finally:
        for child in children:
            child.kill()
    mlflow = client(fresh)
    runs = mlflow.search_runs([mlflow.get_experiment_by_name("sweeps").experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    assert parents[0].data.tags["llm_at_home.sweep"] == sweep
    assert parents[0].info.status == "FINISHED"
    inside = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert sorted(run.info.run_name for run in inside) == ["a", "b"]
    assert {run.info.status for run in inside} == {"FINISHED"}


def test_a_dead_server_costs_seconds_and_the_copy_and_raises_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    tracker = Tracker("http://127.0.0.1:9", "llm-at-home", "x")
    start = time.perf_counter()
    tracker.open(CONFIG, {"model": "tiny"})
    tracker.log_step({"loss": 1.0}, 1)
    tracker.close(Record(task="infer"), tmp_path)
    tracker.discard()
    assert time.perf_counter() - start < 30
    assert tracker.run_id is None
    assert tracker.problem.startswith("MLflow: ")
    assert "\n" not in tracker.problem


def test_a_store_that_breaks_during_the_run_is_noted_and_raises_nothing(uri: str, tmp_path: Path, monkeypatch) -> None:
    tracker = Tracker(uri, "llm-at-home", "x")
    tracker.open({}, {})

    def broken(*arguments: Any, **options: Any) -> None:
        raise OSError("disk I/O error\nand more")

    monkeypatch.setattr(tracker._client, "log_batch", broken)
    tracker.log_step({"loss": 1.0}, 1)
    tracker.log_step({"loss": 1.0}, 2)
    tracker.close(Record(task="infer"), tmp_path)
    assert tracker.problem == "MLflow: OSError: disk I/O error"


def test_a_description_has_whole_lines_and_says_where_the_rest_is() -> None:
    long = described({f"figure_{i}": Reading(float(i), "points", "a | b") for i in range(1000)})
    assert len(long) <= 8000
    assert long.endswith("The rest is in record.json, below Artifacts.")
    assert "| figure_7 | 7 | points | a \\| b |" in long


def test_flattening_loses_nothing() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": None}, "e": [1, {"f": 2}]}) == {
        "a.b.c": "1",
        "a.d": "None",
        "e": "[1, {'f': 2}]",
    }
    exact = "y" * PARAMETER_LENGTH
    assert flatten({"k": exact}) == {"k": exact}
    assert flatten({"k": exact + "z"}) == {"k.part0": exact, "k.part1": "z"}


def test_no_process_that_writes_to_mlflow_reports_to_its_makers(monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY")
    Tracker("sqlite:////proc/nowhere/mlflow.db", "test", "one").open({}, {})
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert "MLFLOW_DISABLE_TELEMETRY=true" in (Path(__file__).parents[2] / "Makefile").read_text()


def test_a_sweep_shows_that_one_of_its_jobs_failed(tmp_path, uri):
    said = {}
    for name, statuses in (("good", ("ok", "out_of_memory")), ("bad", ("failed", "ok"))):
        sweep = tmp_path / name
        sweep.mkdir()
        for status in statuses:
            tracker = Tracker(uri, "statuses", status, str(sweep))
            tracker.open({"seed": 0}, {})
            tracker.close(Record("infer", status), tmp_path)
        parent = client(uri).get_run(tracker.run_id).data.tags["mlflow.parentRunId"]
        said[name] = client(uri).get_run(parent).info.status
    assert said == {"good": "FINISHED", "bad": "FAILED"}
