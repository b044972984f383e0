"""Peaks are taken in processes of their own: this one's history would blur them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

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
    monkeypatch.setattr("llm_at_home.metering.memory._status_kilobytes", lambda field: None)
    meter = MemoryMeter("cpu")
    meter.begin_measured()
    reading = meter.readings()["resident_set_peak"]
    assert reading.value is None
    assert "/proc" in reading.reason
