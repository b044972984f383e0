"""Jobs as processes: skipped when finished, recorded when they die, refused without a trace."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

INFER = ("limit=1", "engine.max_new_tokens=3")


def record(folder):
    return json.loads((folder / "record.json").read_text())


def test_a_finished_hash_is_skipped_and_its_folder_stays_usable(tmp_path, command):
    first, second = tmp_path / "first", tmp_path / "second"
    assert command("infer.py", *INFER, f"hydra.run.dir={first}").returncode == 0
    again = command("infer.py", *INFER, f"hydra.run.dir={second}", "timeout_s=500")
    assert again.returncode == 0
    assert "skipped" in again.stdout
    assert not (second / "record.json").exists()
    forced = command("infer.py", *INFER, f"hydra.run.dir={second}", "rerun=true")
    assert forced.returncode == 0
    assert record(second)["config_hash"] == record(first)["config_hash"]
    other = command("infer.py", *INFER, "seed=1", f"hydra.run.dir={tmp_path}/third")
    assert record(tmp_path / "third")["config_hash"] != record(first)["config_hash"]
    assert "skipped" not in other.stdout


def test_a_sweep_gives_each_job_its_process_and_sums_up(tmp_path, command):
    # without naming a folder, as most people do
    done = command("infer.py", "-m", *INFER, "seed=1,2", "quant=none,nf4")
    assert done.returncode == 0, done.stderr
    assert "4 jobs: 4 ok" in done.stdout
    (folder,) = (path for path in (tmp_path / "multirun" / "infer").iterdir())
    assert len({record(folder / str(i))["config_hash"] for i in range(4)}) == 4


def test_another_launcher_has_the_same_isolation_and_summary(tmp_path, command):
    words = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=1,2")
    done = command("infer.py", "-m", *INFER, *words)
    assert done.returncode == 0, done.stderr
    assert "2 jobs: 2 ok" in done.stdout
    (folder,) = (tmp_path / "multirun" / "infer").iterdir()
    assert [record(folder / str(i))["config"]["seed"] for i in range(2)] == [1, 2]


def test_a_job_that_is_killed_leaves_a_record_and_the_sweep_goes_on(tmp_path, start):
    folder = tmp_path / "sweep"
    words = (*INFER, "seed=1,2", f"hydra.sweep.dir={folder}")
    process = start("infer.py", "-m", *words)
    pid = wait_for_child(process.pid)
    os.kill(pid, signal.SIGKILL)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert record(folder / "0")["status"] == "failed"
    assert "SIGKILL" in record(folder / "0")["error"]["message"]
    assert record(folder / "1")["status"] == "ok"
    assert "1 failed" in out
    assert "1 ok" in out


def test_a_job_that_this_process_cannot_start_is_told_and_fails_the_command(tmp_path, command):
    for job in ("0", "1"):
        (tmp_path / job / "config.yaml").mkdir(parents=True)  # where a file has to be written
    done = command("infer.py", "-m", "limit=1", "seed=1,2", "logger=none", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 1, done.stderr
    assert "2 jobs: 2 failed" in done.stdout
    assert done.stdout.count("IsADirectoryError") == 2


def wait_for_child(parent):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with open(f"/proc/{parent}/task/{parent}/children") as file:
            children = file.read().split()
        if children:
            time.sleep(1)
            return int(children[0])
        time.sleep(0.02)
    pytest.fail("the job's process was not started")


def test_a_time_out_ends_the_job_with_a_record(tmp_path, command):
    folder = tmp_path / "slow"
    done = command("infer.py", "limit=20", "engine.max_new_tokens=1000", "timeout_s=4", f"hydra.run.dir={folder}")
    assert done.returncode == 1
    assert record(folder)["status"] == "timed_out"


def test_a_dead_logger_costs_no_record(tmp_path, command):
    folder = tmp_path / "run"
    dead = ("logger=mlflow", "logger.tracking_uri=http://127.0.0.1:9")
    done = command("infer.py", *INFER, *dead, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    assert record(folder)["status"] == "ok"
    assert any("MLflow" in note for note in record(folder)["notes"])


def test_mlflow_gets_the_run_and_its_sweep(tmp_path, command):
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    folder = tmp_path / "sweep"
    words = ("logger=mlflow", f"logger.tracking_uri={uri}", f"hydra.sweep.dir={folder}")
    done = command("infer.py", "-m", *INFER, "seed=1,2", *words)
    assert done.returncode == 0, done.stderr
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("llm-at-home").experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(runs) == 3
    assert len({run.data.tags["mlflow.parentRunId"] for run in children}) == 1
    child = next(run for run in children if run.data.params["seed"] == "1")
    value = record(folder / "0")["readings"]["decode_tokens_per_second"]["value"]
    assert child.data.metrics["decode_tokens_per_second"] == pytest.approx(value)
    assert child.data.tags["quant"] == "none"
    assert child.data.tags["status"] == "ok"
    assert {"record.json", "answers.jsonl", "config.yaml"} <= {f.path for f in client.list_artifacts(child.info.run_id)}


REFUSED = [
    ("train.py", ["adapter=lokrr"], "lora"),
    ("train.py", ["quant=int8", "adapter=full"], "use adapter=lora or quant=none"),
    ("train.py", ["data=jsonl"], "data.path="),
    ("train.py", ["trainer.max_stepz=3"], "max_stepz"),
    ("train.py", ["adapter_path=/nowhere"], "adapter_config.json"),
    ("infer.py", ["model=custom"], "model.source"),
    ("infer.py", ["model.source=/nowhere"], "is not a folder"),
    ("infer.py", ["model.source=nobody/nothing"], "HF_HUB_OFFLINE"),
    ("infer.py", ["model=llama2_7b", "model.weights=random"], "questions=synthetic"),
    ("infer.py", ["gpu=cuda"], "gpu=auto or gpu=cpu"),
    ("infer.py", ["dtype=float8"], "bfloat16"),
    ("infer.py", ["limit=0"], "at least 1"),
    ("infer.py", ["questions.path=/nowhere.jsonl"], "/nowhere.jsonl"),
    ("evaluate.py", ["answers=/nowhere"], "record.json"),
    ("evaluate.py", [], "answers=RUN_FOLDER"),
    ("evaluate.py", ["task=text", "model.weights=random"], "random weights"),
    ("evaluate.py", ["task=taste"], "judge"),
]


@pytest.mark.parametrize(("script", "overrides", "said"), REFUSED)
def test_a_mistake_is_refused_in_a_line_and_leaves_no_record(tmp_path, command, script, overrides, said):
    folder = tmp_path / "refused"
    done = command(script, *overrides, f"hydra.run.dir={folder}", model=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "record.json").exists()


def test_the_full_error_is_one_variable_away(command):
    done = command("train.py", "quant=int8", "adapter=full", model=False, HYDRA_FULL_ERROR="1")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_judge_gpt4_without_a_key_is_refused(tmp_path, command):
    folder = tmp_path / "answers"
    assert command("infer.py", *INFER, f"hydra.run.dir={folder}").returncode == 0
    done = command("evaluate.py", "judge=gpt4", f"answers={folder}", model=False, OPENAI_API_KEY="")
    assert done.returncode == 2
    assert "OPENAI_API_KEY" in done.stderr


@pytest.mark.slow
def test_a_checkpoint_that_the_cache_lost_is_made_again(tmp_path, command):
    def prune(cache):
        words = ("src/llm_at_home/tasks/prune.py", "prune=magnitude", "prune.sparsity=0.5")
        done = command(*words, LLM_AT_HOME_CACHE=str(tmp_path / cache))
        assert done.returncode == 0, done.stderr[-500:]
        return done.stdout

    assert "ok:" in prune("one")
    assert "skipped:" in prune("one")
    assert "ok:" in prune("another")
    assert list((tmp_path / "another" / "pruned").glob("*/pruning.json"))
