"""The training callbacks over the same meters."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from fake_nvml import FakeGpu

from llm_at_home.metering import energy
from llm_at_home.training.callbacks.memory import PeakMemory
from llm_at_home.training.callbacks.power import PowerMeter

MODULE = SimpleNamespace(device=SimpleNamespace(type="cuda"))


@pytest.mark.parametrize("ending", ["on_train_end", "on_exception"])
def test_the_energy_of_the_steps_that_were_made(driver, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setattr(energy, "SETTLE_SECONDS", 0.0)
    driver(FakeGpu(power_steps=[(time.monotonic() - 60, 100.0)], update_seconds=0.02))
    trainer, power = SimpleNamespace(global_step=40), PowerMeter(idle_seconds=0.2)
    assert power.readings() == {}
    assert power.flags == []
    power.on_train_start(trainer, MODULE)
    process = power._meter._sampler.process
    trainer.global_step = 45
    time.sleep(0.5)
    getattr(power, ending)(trainer, MODULE, *([ValueError()] if ending == "on_exception" else []))
    time.sleep(0.3)  # what comes after is not counted
    power.close()
    power.close()
    assert process.poll() == 0
    figures = power.readings()
    assert figures["energy_gross"].method == "nvml_counter"
    assert figures["energy_per_step"].value == pytest.approx(10.0, rel=0.15)
    assert figures["energy_per_step"].unit == "J/step"
    assert abs(figures["energy_per_step_net"].value) < 2.0, "the load is the idle one"
    assert power.flags == []


def test_peaks_end_with_the_callback() -> None:
    peaks = PeakMemory()
    assert peaks.readings() == {}
    peaks.before_load("cpu")
    peaks.on_train_start(None, None)
    peaks.close()
    assert peaks.readings()["resident_set_peak"].value > 0
