"""Sweeps beyond one process: submitit and Slurm as launchers, Optuna as sweeper, an MLflow server by its address."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from llm_at_home.errors import Refusal
from llm_at_home.records.schema import Reading, Record
from llm_at_home.tasks import launch, plugins, resolve

ROOT = Path(__file__).resolve().parents[2]
INFER = ("limit=1", "engine.max_new_tokens=3")
# Slurm's commands as submitit calls them, with this machine as the only node; jobs run until their results are there.
SBATCH = """#!{python}
import os, re, subprocess, sys
script = sys.argv[-1]
lines = open(script).read().splitlines()
options = dict(re.findall(r"#SBATCH --([a-z-]+)=(.*)", "\\n".join(lines)))
first, last = map(int, re.match(r"(\\d+)-(\\d+)", options["array"]).groups())
open({log!r}, "w").write("\\n".join(f"{{key}}={{value}}" for key, value in options.items()))
for task in range(first, last + 1):
    one = {{"SLURM_JOB_ID": f"{{70 + task}}", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)}}
    one |= {{"SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}}
    one |= {{"SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "1"}}
    nowhere = subprocess.DEVNULL
    subprocess.Popen(["bash", script], env={{**os.environ, **one}}, stdout=nowhere, stderr=nowhere)
print("Submitted batch job 7")
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do case $1 in --output|--error) shift 2;; *) shift;; esac; done
exec "$@"
"""
SACCT = """#!/bin/bash
echo 'JobID|State|NodeList'
for i in 0 1; do echo "7_$i|RUNNING|here"; done
"""


@pytest.mark.parametrize("word", ["hydra/launcher=submitit", "hydra/launcher=slurm", "hparams_search=lora"])
def test_a_plugin_that_is_not_installed_is_refused_in_a_line(monkeypatch, word):
    plugins.check(["-m", word, "hparams_search=null", "quant=nf4"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Refusal, match=r"not installed: pip install -e '\.\[(launchers|search)\]'"):
        plugins.check(["-m", word])


def read(folder: Path) -> dict:
    return json.loads((folder / "record.json").read_text())


def one_record(**readings: float | None) -> Record:
    known = {
        name: Reading(value, "1", "counted") if value else Reading.unknown("1", "why")
        for name, value in readings.items()
    }
    return Record("train", readings=known)


def test_a_metric_is_one_figure_or_several_and_unknown_when_one_is():
    record = one_record(a=1.5, b=2.5, c=None)
    assert launch._metric(record, "a") == 1.5
    assert launch._metric(record, ["a", "b"]) == [1.5, 2.5]
    for wanted in ("c", ["a", "c"], ["a", "nothing"], None):
        assert launch._metric(record, wanted) is None
    assert launch._metric(None, "a") is None


def test_a_metric_that_no_record_has_is_told(capsys):
    record = one_record(loss_last=1.5, load_time=2.0, energy=None)
    for wanted, said in (("los_last", "which has loss_last"), ("zzz", "which has energy, load_time, loss_last")):
        assert launch._metric(record, wanted) is None
        assert f"metric={wanted} is no figure of this record, {said}\n" in capsys.readouterr().err
    record.status = "failed"  # whose figures are not there for another reason
    for wanted in ("loss_last", "energy", "los_last"):
        launch._metric(record, wanted)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("launcher", ["joblib", "submitit", "slurm"])
def test_a_launcher_is_a_choice(launcher):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("infer", [f"hydra/launcher={launcher}"], return_hydra_config=True)
    assert "Launcher" in config.hydra.launcher._target_


def test_the_search_names_keys_that_are_there():
    words = ["hparams_search=lora", "experiment=handbook"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", words, return_hydra_config=True)
        compose("train", [f"{key}=1" for key in config.hydra.sweeper.params])
    assert config.adapter.lora_alpha == config.adapter.r
    assert len(config.metric) == len(config.hydra.sweeper.direction) == 2
    assert "optuna" in config.hydra.sweeper._target_


@pytest.mark.parametrize(
    ("words", "why"),
    [(["held_out=0"], "at least 1"), (["held_out=4", "data=synthetic", "model.weights=random"], "random")],
)
def test_what_cannot_be_held_out_is_refused(words, why):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = resolve.resolve("train", compose("train", ["gpu=cpu", *words]))
    with pytest.raises(Refusal, match=why):
        resolve.check("train", config)


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    """A real ``mlflow server`` on loopback; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        f"{tmp_path}/artifacts",
    ]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            *words,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        with socket.socket() as trying:
            if trying.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert process.poll() is None
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, 15)
    process.wait(timeout=20)


@pytest.mark.slow
def test_submitit_gives_each_job_its_process_and_a_server_its_copy(tmp_path, command, mlflow_server):
    from mlflow.tracking import MlflowClient

    folder = tmp_path / "sweep"
    words = ("hydra/launcher=submitit", "seed=1,2", f"hydra.sweep.dir={folder}")
    logged = ("logger=mlflow", f"logger.tracking_uri={mlflow_server}")
    done = command("infer.py", "-m", *INFER, *words, *logged)
    assert done.returncode == 0, done.stderr
    assert "2 jobs: 2 ok" in done.stdout
    assert [read(folder / str(i))["config"]["seed"] for i in range(2)] == [1, 2]
    client = MlflowClient(mlflow_server)
    runs = client.search_runs([client.get_experiment_by_name("llm-at-home").experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert (len(runs), len(children)) == (3, 2)
    assert len({run.data.tags["mlflow.parentRunId"] for run in children}) == 1
    for run in children:
        assert {artifact.path for artifact in client.list_artifacts(run.info.run_id)} >= {
            "record.json",
            "answers.jsonl",
        }


@pytest.mark.slow
def test_slurm_is_asked_for_a_job_each(tmp_path, command):
    commands, log = tmp_path / "slurm", tmp_path / "sbatch.txt"
    commands.mkdir()
    (commands / "sbatch").write_text(SBATCH.format(python=sys.executable, log=str(log)))
    (commands / "srun").write_text(SRUN)
    (commands / "sacct").write_text(
        "#!/bin/bash\necho 'JobID|State|NodeList'\nfor i in 0 1; do echo \"7_$i|RUNNING|here\"; done\n"
    )
    for file in commands.iterdir():
        file.chmod(0o755)
    folder = tmp_path / "sweep"
    words = ("hydra/launcher=slurm", "hydra.launcher.partition=gpu", "seed=1,2", f"hydra.sweep.dir={folder}")
    done = command("infer.py", "-m", *INFER, *words, PATH=f"{commands}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert "2 jobs: 2 ok" in done.stdout
    assert [read(folder / str(i))["config"]["seed"] for i in range(2)] == [1, 2]
    asked = log.read_text()
    for option in ("array=0-1%2", "partition=gpu", "gpus-per-node=1", "time=240", "mem=32GB"):
        assert option in asked


@pytest.mark.slow
def test_optuna_searches_against_two_figures(tmp_path, command):
    folder = tmp_path / "search"
    words = ("hparams_search=lora", "held_out=3", "limit=8", "trainer.max_steps=2", "callbacks.power.idle_seconds=0")
    few = ("hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.n_startup_trials=2", f"hydra.sweep.dir={folder}")
    done = command("train.py", "-m", *words, *few, "callbacks.accumulation.steps=1", "adapter.r=choice(4,8)")
    assert done.returncode == 0, done.stderr
    trials = [read(folder / str(i)) for i in range(3)]
    assert all(trial["status"] == "ok" for trial in trials)
    figures = [
        (trial["quality"]["perplexity_test"]["value"], trial["readings"]["resident_set_peak"]["value"])
        for trial in trials
    ]
    found = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    best = sorted(tuple(solution["values"]) for solution in found["solutions"])
    unbeaten = sorted(
        {one for one in figures if not any(a <= one[0] and b <= one[1] and (a, b) != one for a, b in figures)}
    )
    assert [list(one) for one in sorted(set(best))] == [pytest.approx(list(one)) for one in unbeaten]
    assert len({trial["config"]["optimizer"]["lr"] for trial in trials}) > 1


@pytest.mark.slow
def test_a_search_without_a_single_figure_still_tells_its_jobs(tmp_path, command):
    words = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.max_failure_rate=1.0", "held_out=0")
    done = command("train.py", "-m", *words, "optimizer.lr=interval(0.1,0.2)", f"hydra.sweep.dir={tmp_path / 'search'}")
    assert done.returncode == 2
    assert "2 jobs: 2 refused" in done.stdout
