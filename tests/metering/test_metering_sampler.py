"""The sampler as it really runs: another process, over pipes, with a fake NVML on its path."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_nvml import FakeGpu, fake_nvml

from llm_at_home.metering import sampler as module
from llm_at_home.metering import session
from llm_at_home.metering.session import SamplerSession, borrow, give_back, own_process_ids, used_gpus

UUID = FakeGpu().uuid


def busy(watts: float = 100.0, **options) -> FakeGpu:
    return FakeGpu(power_steps=[(time.monotonic() - 60, watts)], **options)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pid: int, within: float = 5.0) -> bool:
    deadline = time.monotonic() + within
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


@pytest.fixture
def sampler(driver):
    driver(busy(update_seconds=0.02))
    running = SamplerSession([UUID])
    yield running
    running.close()


# -- what it measures


@pytest.mark.parametrize(("update", "interval"), [(0.02, 0.01), (0.1, 0.05), (0.4, 0.2)])
def test_it_samples_at_half_the_drivers_update_period(driver, update: float, interval: float) -> None:
    driver(busy(update_seconds=update))
    running = SamplerSession([UUID])
    running.wait_until_calibrated()
    answer = running.mark("x")
    assert answer["period"] == pytest.approx(update, rel=0.1)
    assert answer["interval"] == pytest.approx(interval, rel=0.1)
    time.sleep(1.0)
    samples = running.read()["windows"]["x"]["samples"]
    assert samples == pytest.approx(1.0 / interval, rel=0.25, abs=2)
    running.close()


@pytest.mark.parametrize(("update", "interval"), [(0.004, 0.005), (5.0, 0.05)])
def test_the_interval_has_bounds_and_a_default(driver, update: float, interval: float) -> None:
    driver(busy(update_seconds=update))
    running = SamplerSession([UUID])
    running.wait_until_calibrated()
    answer = running.read()
    assert answer["interval"] == interval
    assert (answer["period"] is None) == (update == 5.0), "too slow to be seen in two seconds"
    running.close()


def test_energy_is_the_integral_between_two_questions(sampler: SamplerSession) -> None:
    first = sampler.read()
    time.sleep(0.7)
    second = sampler.read()
    seconds = second["clock"] - first["clock"]
    assert seconds == pytest.approx(0.7, abs=0.05)
    assert second["joules"] - first["joules"] == pytest.approx(100 * seconds, rel=0.001)


def test_between_two_samples_power_is_taken_to_change_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [FakeGpu(power_mw=100_000), FakeGpu(uuid="GPU-2", power_mw=0)]
    now = 50.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    watching = module.Sampler(fake_nvml(gpus), [gpu.uuid for gpu in gpus], [1])
    now, gpus[0].power_mw, gpus[1].power_mw = 52.0, 200_000, 50_000
    watching.sample()
    assert watching.joules == pytest.approx(2 * (100 + 250) / 2)


def test_windows_begin_anew_and_are_forgotten(driver) -> None:
    (gpu,) = driver(busy(used_bytes=1))
    running = SamplerSession([UUID])
    assert running.mark("whole")["windows"]["whole"]["device"] == 1
    for gpu.used_bytes in (9, 4):  # the peak is over before anybody asks
        driver.publish()
        time.sleep(0.3)
    answer = running.mark("part")
    assert (answer["windows"]["whole"]["device"], answer["windows"]["part"]["device"]) == (9, 4)
    assert running.mark("whole")["windows"]["whole"]["device"] == 4
    running.drop("part")
    assert set(running.read()["windows"]) == {"whole"}
    running.close()


def test_it_needs_nothing_but_the_standard_library_and_nvml() -> None:
    code = "import sys, llm_at_home.metering.sampler as s; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    allowed = set(sys.stdlib_module_names) | {"pynvml", "llm_at_home", "__main__"}
    foreign = {name for name in done.stdout.split() if name not in allowed and not name.startswith("_")}
    assert not foreign & {"torch", "numpy", "transformers", "lightning", "hydra", "omegaconf", "psutil"}
    assert "pynvml" not in done.stdout.split(), "not before it is run"


# -- how it ends


def test_it_ends_when_its_stdin_closes(sampler: SamplerSession) -> None:
    assert sampler.read()
    process = sampler.process
    process.stdin.close()
    assert process.wait(timeout=5) == 0


def test_closing_ends_it_and_what_is_asked_then_is_unknown(sampler: SamplerSession) -> None:
    assert sampler.read()
    process = sampler.process
    sampler.close()
    sampler.close()
    assert process.returncode == 0
    assert sampler.read() is None
    assert sampler.problem == "the sampler was closed"


def test_it_ends_without_a_word_when_nobody_reads(driver) -> None:
    driver(busy())
    words = [sys.executable, "-m", "llm_at_home.metering.sampler", "--parent", str(os.getpid())]
    process = subprocess.Popen(
        [*words, "--pid", "1", "--gpu", UUID],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdin.write(b'{"do": "read"}\n' * 3)
    process.stdin.flush()
    assert process.wait(timeout=10) == 0
    assert process.stderr.read() == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_is_the_jobs_to_answer(sampler: SamplerSession, number: int) -> None:
    assert sampler.read()
    sampler.process.send_signal(number)
    time.sleep(0.1)
    assert sampler.read() is not None


PARENT = """
import os, sys, time
from llm_at_home.metering.session import SamplerSession
sampler = SamplerSession([{uuid!r}])
assert sampler.read()
fork = os.fork() if {forks} else 0
if {forks} and fork == 0:
    time.sleep(60)  # holds the sampler's stdin open
print(sampler.process.pid, fork, flush=True)
{ending}
"""


@pytest.mark.parametrize(
    ("forks", "ending"),
    [
        (False, "time.sleep(60)"),  # and is killed
        (True, "time.sleep(60)"),
        (False, "sys.exit(3)"),
        (False, "os._exit(3)"),
        (False, "raise ValueError"),
    ],
)
def test_no_process_is_left_when_the_parent_ends(driver, forks: bool, ending: str) -> None:
    driver(busy())
    code = PARENT.format(uuid=UUID, forks=forks, ending=ending)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    pid, fork = map(int, parent.stdout.readline().split())
    try:
        if "sleep" in ending:
            assert alive(pid)
            parent.kill()
        parent.wait(timeout=10)
        assert gone(pid)
    finally:
        if fork:
            os.kill(fork, signal.SIGKILL)
        parent.stdout.close()


# -- when it fails


def test_a_gpu_that_the_driver_does_not_know_is_a_reason(driver) -> None:
    driver(busy())
    running = SamplerSession(["GPU-unknown"])
    assert running.read() is None
    assert running.problem == "the sampler failed (NVMLError_NotFound: Not Found)"


def test_a_python_that_does_not_start_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.sys, "executable", "/nowhere/python")
    running = SamplerSession([UUID])
    assert running.read() is None
    assert "could not be started" in running.problem


def test_death_is_a_reason(sampler: SamplerSession) -> None:
    assert sampler.read()
    sampler.process.kill()
    assert sampler.read() is None
    assert "its process was ended by signal 9" in sampler.problem


def test_one_that_hangs_does_not_hang_the_run(sampler: SamplerSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "ANSWER_SECONDS", 0.3)
    assert sampler.read()
    pid = sampler.process.pid
    os.kill(pid, signal.SIGSTOP)
    before = time.monotonic()
    assert sampler.read() is None
    assert time.monotonic() - before < 5
    assert "no answer in 0.3 s" in sampler.problem
    assert gone(pid)


def test_an_answer_that_nobody_waited_for_is_passed_over(sampler: SamplerSession) -> None:
    assert sampler.read()
    sampler.process.stdin.write(json.dumps({"do": "read", "id": -1}).encode() + b"\n")  # Ctrl-C came before its answer
    assert "x" in sampler.mark("x")["windows"]


# -- who shares it


def test_meters_of_a_process_share_one_and_the_last_ends_it(driver) -> None:
    driver(busy())
    first, second = borrow(used_gpus()), borrow(used_gpus())
    assert first is second
    pid = first.process.pid
    give_back(first)
    assert second.read() is not None
    give_back(second)
    assert gone(pid)
    third = borrow(used_gpus())
    assert third is not first
    give_back(third)


def test_after_a_death_the_next_meter_gets_a_new_one(driver) -> None:
    driver(busy())
    first = borrow(used_gpus())
    first.process.kill()
    assert first.read() is None
    second = borrow(used_gpus())
    assert second.read() is not None
    give_back(first)
    assert second.read() is not None
    give_back(second)


def test_a_process_knows_its_ids_in_every_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.getpid() in own_process_ids()
    monkeypatch.setattr(Path, "read_text", lambda self: "Name:\tpython\nNSpid:\t70123\t17\nThreads:\t1\n")
    assert own_process_ids() == sorted({70123, 17, os.getpid()})
