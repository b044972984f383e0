"""However a job ends, it leaves a record that says so, nothing lives on, and a sweep goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
TRAIN = ("limit=8", "adapter.r=2", "trainer.max_steps=3", "callbacks.accumulation.steps=1")


def disaster(kind, **options):
    words = [f"+callbacks.disaster.kind={kind}", "+callbacks.disaster._target_=disasters.Disaster"]
    return [*words, *(f"+callbacks.disaster.{key}={value}" for key, value in options.items())]


def record(folder):
    return json.loads((folder / "record.json").read_text())


def gone(pid):
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [
        ("error", "failed", "the sky fell"),
        ("segfault", "failed", "SIGSEGV"),
        ("address_space", "out_of_memory", "memory"),
    ],
)
def test_each_ending_has_its_record(tmp_path, command, kind, status, said):
    folder, left = tmp_path / "run", tmp_path / "pid"
    done = command("train.py", *TRAIN, *disaster(kind, leave_behind=left), f"hydra.run.dir={folder}", PYTHONPATH=HERE)
    found = record(folder)
    assert found["status"] == status, found["error"]
    assert said in found["error"]["message"]
    assert found["readings"]["resident_set_peak"]["value"] > 0.1
    assert found["provenance"]["packages"]["torch"]
    assert any("disasters.py" in line for line in found["error"]["log"]), found["error"]["log"]
    assert done.returncode == (0 if status == "out_of_memory" else 1)
    assert "Traceback" not in done.stderr
    wait_until(lambda: gone(int(left.read_text())))


@pytest.fixture
def memory_limited(tmp_path):
    """A control group with 1.5 GB of memory, as words to put before a command."""
    version_1 = Path("/sys/fs/cgroup/memory")
    root = version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")
    group = root / f"llm_at_home_{os.getpid()}"
    limit = "memory.limit_in_bytes" if version_1.is_dir() else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text("1500000000")
    except OSError as error:
        pytest.skip(f"the kernel's killer can only be provoked safely where control groups may be made ({error})")
    yield group / "cgroup.procs"
    wait_until(lambda: not (group / "cgroup.procs").read_text().split())
    group.rmdir()


def test_the_kernel_s_out_of_memory_killer_is_told_from_any_other(tmp_path, start, memory_limited):
    folder = tmp_path / "run"
    process = start("train.py", *TRAIN, *disaster("resident"), f"hydra.run.dir={folder}", PYTHONPATH=HERE)
    child = []

    def found_child():
        child[:] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return child

    wait_until(found_child)
    memory_limited.write_text(child[0])
    _, err = process.communicate(timeout=120)
    assert record(folder)["status"] == "out_of_memory", err
    assert "out-of-memory killer" in record(folder)["error"]["message"]
    assert record(folder)["readings"]["resident_set_peak"]["value"] == pytest.approx(1.5, abs=0.5)
    assert process.returncode == 0, "out of memory is a result"


def test_a_hanging_job_is_killed_after_its_grace(tmp_path, command):
    folder, left = tmp_path / "run", tmp_path / "pid"
    start = time.monotonic()
    words = (*TRAIN, *disaster("hang", leave_behind=left), "timeout_s=40", "grace_s=1", f"hydra.run.dir={folder}")
    done = command("train.py", *words, PYTHONPATH=HERE)
    assert done.returncode == 1
    assert time.monotonic() - start < 90
    assert record(folder)["status"] == "timed_out"
    wait_until(lambda: gone(int(left.read_text())))


def test_ctrl_c_twice_ends_everything_at_once(tmp_path, start):
    folder, left = tmp_path / "run", tmp_path / "pid"
    process = start(
        "train.py", *TRAIN, *disaster("hang", leave_behind=left), f"hydra.run.dir={folder}", PYTHONPATH=HERE
    )
    wait_until(lambda: left.exists() and left.read_text())
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert record(folder)["status"] == "interrupted"
    wait_until(lambda: gone(int(left.read_text())))


def test_ctrl_c_ends_the_sweep_and_says_what_was_done(tmp_path, start):
    folder, left = tmp_path / "sweep", tmp_path / "pid"
    words = (*TRAIN, *disaster("wait", leave_behind=left), "seed=1,2,3", f"hydra.sweep.dir={folder}")
    process = start("train.py", "-m", *words, PYTHONPATH=HERE)
    wait_until(lambda: left.exists() and left.read_text())
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "1 jobs: 1 interrupted" in out
    assert not (folder / "1" / "record.json").exists()


def test_a_killed_command_takes_its_job_with_it(tmp_path, start):
    folder, left = tmp_path / "run", tmp_path / "pid"
    words = (*TRAIN, *disaster("wait", leave_behind=left), "grace_s=1", f"hydra.run.dir={folder}")
    process = start("train.py", *words, PYTHONPATH=HERE)
    wait_until(lambda: left.exists() and left.read_text())
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    process.kill()
    wait_until(lambda: all(gone(int(pid)) for pid in [*children, left.read_text()]))


def test_a_sweep_goes_on_over_a_crash_and_sums_up(tmp_path, command):
    folder = tmp_path / "sweep"
    words = ["+callbacks.disaster.kind=segfault,none", "+callbacks.disaster._target_=disasters.Disaster"]
    done = command("train.py", "-m", *TRAIN, *words, f"hydra.sweep.dir={folder}", PYTHONPATH=HERE)
    assert done.returncode == 1
    assert "2 jobs: 2 failed" in done.stdout
    assert "SIGSEGV" in record(folder / "0")["error"]["message"]
    assert "AttributeError" in record(folder / "1")["error"]["type"]


def test_forty_run_folders_made_at_once_are_forty():
    import subprocess
    import sys

    code = "from llm_at_home.tasks.launch import run_stamp; print(run_stamp())"
    environment = {key: value for key, value in os.environ.items() if key != "LLM_AT_HOME_STAMP"}
    stamps = []
    for _ in range(2):  # twenty at a time: two cores
        processes = [
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
            for _ in range(20)
        ]
        stamps += [process.communicate()[0].strip() for process in processes]
    assert len(set(stamps)) == 40
