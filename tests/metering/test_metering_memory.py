"""Peaks are taken in processes of their own: this one's history would blur them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from fake_nvml import FakeGpu, FakeMig

from llm_at_home.metering import session
from llm_at_home.metering.energy import EnergyMeter
from llm_at_home.metering.memory import CPU_ONLY, DRIVER_FIGURES, TORCH_PEAKS, MemoryMeter

BLOCK_GB = 0.3

SCRIPT = """
import json, sys
from llm_at_home.metering.memory import MemoryMeter, _status_kilobytes

def block():
    return bytearray(b"x") * int({gb} * 1e9)

{before}
base = _status_kilobytes("VmRSS") * 1024 / 1e9
meter = MemoryMeter("cpu")
{loading}
meter.begin_measured()
start = _status_kilobytes("VmRSS") * 1024 / 1e9
{measured}
figures = {{name: (r.value, r.unit, r.method) for name, r in meter.readings().items()}}
print(json.dumps({{"base": base, "start": start, "figures": figures}}))
"""


def peaks(before: str = "", loading: str = "", measured: str = "") -> tuple[float, float]:
    """By how many GB the whole peak and the measured one rose above what was in use when each began."""
    script = SCRIPT.format(gb=BLOCK_GB, before=before, loading=loading, measured=measured)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    out = json.loads(done.stdout)
    for name in ("resident_set_peak", "measured_resident_set_peak"):
        assert out["figures"][name][1:] == ["GB", "kernel_high_water_mark"]
    return (
        out["figures"]["resident_set_peak"][0] - out["base"],
        out["figures"]["measured_resident_set_peak"][0] - out["start"],
    )


def about_a_block(value: float) -> bool:
    return value == pytest.approx(BLOCK_GB, rel=0.1)


def nothing(value: float) -> bool:
    return abs(value) < 0.1 * BLOCK_GB


def test_a_block_of_the_measured_phase_raises_both_peaks_by_its_size() -> None:
    whole, measured = peaks(measured="b = block()")
    assert about_a_block(whole)
    assert about_a_block(measured)


def test_a_block_freed_within_the_measured_phase_still_counts() -> None:
    whole, measured = peaks(measured="b = block(); del b")
    assert about_a_block(whole)
    assert about_a_block(measured)


def test_a_block_freed_before_the_measured_phase_counts_in_the_whole_peak_only() -> None:
    whole, measured = peaks(loading="b = block(); del b")
    assert about_a_block(whole)
    assert nothing(measured)


def test_a_block_freed_before_the_meter_was_made_counts_nowhere() -> None:
    whole, measured = peaks(before="b = block(); del b")
    assert nothing(whole)
    assert nothing(measured)


def test_a_block_held_from_loading_is_in_the_measured_peak_too() -> None:
    whole, measured = peaks(loading="b = block()", measured="c = b[: len(b) // 2]")
    assert whole == pytest.approx(1.5 * BLOCK_GB, rel=0.1)
    assert measured == pytest.approx(0.5 * BLOCK_GB, rel=0.1)


def test_on_the_cpu_the_gpus_figures_are_unknown_with_the_reason() -> None:
    figures = MemoryMeter("cpu").readings()
    for name in TORCH_PEAKS + DRIVER_FIGURES:
        assert figures[name].value is None
        assert figures[name].reason == CPU_ONLY
    assert "measured_resident_set_peak" not in figures


def test_a_peak_that_cannot_be_reset_says_since_when_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_at_home.metering.memory._reset_resident_peak", lambda: False)
    meter = MemoryMeter("cpu")
    meter.begin_measured()
    figures = meter.readings()
    assert figures["resident_set_peak"].method == "kernel_high_water_mark_since_process_start"
    assert "measured_resident_set_peak" not in figures


def test_without_proc_the_resident_set_is_unknown_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_at_home.metering.memory._status_kilobytes", lambda field, pid="self": None)
    meter = MemoryMeter("cpu")
    meter.begin_measured()
    reading = meter.readings()["resident_set_peak"]
    assert reading.value is None
    assert "/proc" in reading.reason


# -- on a GPU: torch's functions are stood in for, the sampler is real


@pytest.fixture
def torch_peaks(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    import torch

    peaks = {"allocated": 2_000_000_000, "reserved": 3_000_000_000}
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda i: peaks.update(allocated=0, reserved=0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda i: peaks["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda i: peaks["reserved"])
    return peaks


def test_four_names_on_a_gpu_each_whole_and_measured(driver, torch_peaks) -> None:
    processes = [(os.getpid(), 3 * 10**9), (4_000_000, 5 * 10**9)]
    (gpu,) = driver(FakeGpu(used_bytes=1 * 10**9, processes=processes))
    with MemoryMeter("cuda") as meter:
        torch_peaks.update(allocated=2 * 10**9, reserved=3 * 10**9)
        for gpu.used_bytes in (7 * 10**9, 4 * 10**9):  # the peak is over before anybody asks
            driver.publish()
            time.sleep(0.4)
        meter.begin_measured()
        torch_peaks.update(allocated=1 * 10**9, reserved=int(2.5e9))
        gpu.processes[0] = (os.getpid(), 2 * 10**9)
        driver.publish()
        figures = meter.readings()
    value = {name: reading.value for name, reading in figures.items()}
    assert value["torch_allocated_peak"] == 2.0
    assert value["torch_reserved_peak"] == 3.0
    assert value["device_memory_peak"] == 7.0
    assert value["process_memory_peak"] == 3.0
    assert value["measured_torch_allocated_peak"] == 1.0
    assert value["measured_torch_reserved_peak"] == 2.5
    assert value["measured_device_memory_peak"] == 4.0
    assert value["measured_process_memory_peak"] == 3.0, "what it held when the phase began"
    assert figures["device_memory_peak"].method == "nvml_sampled_50ms"
    assert figures["device_memory_peak"].n >= 10
    assert meter.readings()["device_memory_peak"].value == 7.0, "the last word stays after closing"


@pytest.mark.parametrize(
    ("processes", "reason"),
    [
        ([], "lists no process at all"),
        ([(4_000_000, 10**9)], "none under an id of this one"),
        ([(os.getpid(), None)], "without a figure"),
        ([(os.getpid(), 0)], "without a figure"),
    ],
)
def test_a_process_that_the_driver_does_not_show_is_unknown_with_the_reason(
    driver, torch_peaks, processes, reason: str
) -> None:
    driver(FakeGpu(processes=processes, used_bytes=10**9))
    with MemoryMeter("cuda") as meter:
        figures = meter.readings()
    assert figures["process_memory_peak"].value is None
    assert reason in figures["process_memory_peak"].reason
    assert figures["device_memory_peak"].value == 1.0


def test_a_process_is_found_under_the_id_of_an_outer_namespace(driver, torch_peaks, monkeypatch) -> None:
    monkeypatch.setattr(session, "own_process_ids", lambda: [17, 4_000_000])
    driver(FakeGpu(processes=[(4_000_000, 2 * 10**9), (4_000_001, 10**9)]))
    with MemoryMeter("cuda") as meter:
        assert meter.readings()["process_memory_peak"].value == 2.0


def test_a_mig_slice_has_its_own_memory(driver, torch_peaks, monkeypatch) -> None:
    part = FakeMig(uuid="MIG-1", used_bytes=2 * 10**9, processes=[(os.getpid(), 10**9)])
    driver(FakeGpu(used_bytes=9 * 10**9, mig=[FakeMig(uuid="MIG-0", used_bytes=7 * 10**9), part]))
    monkeypatch.setattr(session, "used_gpus", lambda count: [SimpleNamespace(uuid="MIG-1", mig=True)])
    with MemoryMeter("cuda") as meter:
        figures = meter.readings()
    assert figures["device_memory_peak"].value == 2.0
    assert figures["process_memory_peak"].value == 1.0


def test_two_gpus_are_added_up_and_a_third_is_not_looked_at(driver, torch_peaks) -> None:
    uuids = [f"GPU-{i}" for i in range(3)]
    driver(*(FakeGpu(uuid=uuid, used_bytes=(i + 1) * 10**9) for i, uuid in enumerate(uuids)), visible="2,0,1")
    with MemoryMeter("cuda", gpus=2) as meter:
        assert meter.readings()["device_memory_peak"].value == 4.0


def test_a_driver_that_refuses_is_a_reason(driver, torch_peaks) -> None:
    refused = {"nvmlDeviceGetMemoryInfo": 4, "nvmlDeviceGetComputeRunningProcesses": 4}
    driver(FakeGpu(used_bytes=10**9, errors=refused))
    with MemoryMeter("cuda") as meter:
        for name in DRIVER_FIGURES:
            assert "Insufficient Permissions" in meter.readings()[name].reason


def test_what_was_not_watched_to_its_end_has_no_peak(driver, torch_peaks) -> None:
    (gpu,) = driver(FakeGpu(used_bytes=10**9, processes=[(os.getpid(), 10**9)]))
    with MemoryMeter("cuda") as meter:
        assert meter.readings()["device_memory_peak"].value == 1.0
        gpu.errors["nvmlDeviceGetMemoryInfo"] = 15
        driver.publish()
        figures = meter.readings()
        assert "GPU is lost" in figures["device_memory_peak"].reason
        assert figures["process_memory_peak"].value == 1.0
        meter._driver._sampler.process.kill()
        figures = meter.readings()
    for name in DRIVER_FIGURES:
        assert "ended by signal 9" in figures[name].reason
    assert figures["torch_allocated_peak"].value is not None


def test_without_a_visible_gpu_the_drivers_figures_are_unknown(driver, torch_peaks) -> None:
    driver(FakeGpu(), visible="")
    meter = MemoryMeter("cuda")
    meter.begin_measured()
    assert meter.readings()["measured_device_memory_peak"].reason == "the driver names no visible GPU"


def test_both_meters_share_a_sampler(driver, torch_peaks) -> None:
    driver(FakeGpu())
    memory, energy = MemoryMeter("cuda"), EnergyMeter("cuda")
    assert energy._sampler is memory._driver._sampler
    process = energy._sampler.process
    memory.close()
    assert process.poll() is None
    energy.close()
    energy.close()
    assert process.poll() == 0
