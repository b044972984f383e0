from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from card_state import HW_SLOWDOWN, HW_THERMAL, POWER_BRAKE, SW_POWER_CAP, SW_THERMAL, answer, clean, process
from fake_nvml import FakeGpu, FakeMig

from llm_at_home.errors import Refusal
from llm_at_home.hardware import condition
from llm_at_home.hardware.condition import card_condition, require_clean, snapshot

CUDA = {"name": "cuda", "device": "cuda", "card": "NVIDIA Fake", "emulated": False}
FOREIGN = 4_000_000  # above the kernel's largest process id


@pytest.fixture
def machine(driver):
    def install(*gpus: FakeGpu, **options):
        listed = driver(*(gpus or (FakeGpu(),)), **options)
        clean()
        return listed

    return install


@pytest.fixture(autouse=True)
def no_cuda_here(monkeypatch):
    monkeypatch.setattr(condition, "_holds_cuda", lambda: False)


def test_a_card_at_rest_is_clean(machine):
    machine()
    assert card_condition(CUDA) == []


def test_the_cpu_and_a_machine_without_a_gpu_have_no_condition(machine):
    machine(FakeGpu(processes=[(FOREIGN, 1)]))
    assert card_condition({"name": "cpu", "device": "cpu"}) == []
    machine(FakeGpu(processes=[(FOREIGN, 1)]), visible="")
    assert card_condition(CUDA) == []
    assert snapshot() == {}


def test_others_on_the_card_are_named_and_this_process_and_its_children_are_not(machine):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        machine(FakeGpu(processes=[(os.getpid(), 1), (child.pid, None)]))
        assert card_condition(CUDA) == []
        machine(FakeGpu(processes=[(os.getpid(), 1), (os.getppid(), 2_500_000_000)]))
        assert card_condition(CUDA) == [f"process {os.getppid()} uses the card (2.5 GB)"]
        child.communicate(b"\n")


def test_what_draws_on_the_card_uses_it_too(machine):
    machine(FakeGpu(processes=[(FOREIGN, 1_000_000_000)]))
    answer(nvmlDeviceGetGraphicsRunningProcesses=[process(FOREIGN, 1_000_000_000), process(FOREIGN + 1, None)])
    assert card_condition(CUDA) == [
        f"process {FOREIGN} uses the card (1.0 GB)",
        f"process {FOREIGN + 1} uses the card",
    ]


def test_in_a_container_the_one_unknown_process_is_this_one_once_it_holds_cuda(machine, monkeypatch):
    gpu = FakeGpu(processes=[(FOREIGN, 1)])
    machine(gpu)
    assert len(card_condition(CUDA)) == 1, "before CUDA is open it can only be another's"
    monkeypatch.setattr(condition, "_holds_cuda", lambda: True)
    assert card_condition(CUDA) == []
    gpu.processes.append((FOREIGN + 1, 1))
    assert len(card_condition(CUDA)) == 2


def test_memory_in_use_without_a_process_to_show_for_it(machine, monkeypatch):
    gpu = FakeGpu(used_bytes=900_000_000)
    machine(gpu)
    assert card_condition(CUDA) == [], "an idle driver's own share"
    gpu.used_bytes = 3_000_000_000
    assert card_condition(CUDA) == ["3.0 GB of the card's memory are in use by others"]
    monkeypatch.setattr(condition, "_holds_cuda", lambda: True)
    assert card_condition(CUDA) == [], "it may be this process's own"


@pytest.mark.parametrize(("used", "flags"), [(200_000_000, 0), (300_000_000, 1)])
def test_a_driver_that_counts_its_own_share_apart_is_believed_sooner(machine, monkeypatch, used, flags):
    machine(FakeGpu(used_bytes=900_000_000))
    nvml = sys.modules["pynvml"]
    first = nvml.nvmlDeviceGetMemoryInfo
    second = SimpleNamespace(total=16_000_000_000, used=used, reserved=600_000_000)
    monkeypatch.setattr(nvml, "nvmlMemory_v2", 2, raising=False)
    monkeypatch.setattr(nvml, "nvmlDeviceGetMemoryInfo", lambda handle, v=None: second if v == 2 else first(handle))
    assert len(card_condition(CUDA)) == flags


@pytest.mark.parametrize(("percent", "flags"), [(10, []), (11, ["the card is 11 % busy"])])
def test_a_busy_card(machine, percent, flags):
    machine()
    answer(nvmlDeviceGetUtilizationRates=SimpleNamespace(gpu=percent, memory=0))
    assert card_condition(CUDA) == flags


@pytest.mark.parametrize(
    ("reasons", "names"),
    [
        (SW_POWER_CAP, []),
        (HW_SLOWDOWN, ["hardware slowdown"]),
        (SW_THERMAL, ["software thermal slowdown"]),
        (HW_SLOWDOWN | HW_THERMAL, ["hardware slowdown", "hardware thermal slowdown"]),
        (POWER_BRAKE | SW_POWER_CAP, ["power brake"]),
    ],
)
@pytest.mark.parametrize("old_driver", [False, True])
def test_clocks_that_are_held_back(machine, reasons, names, old_driver):
    machine()
    answer(
        nvmlDeviceGetCurrentClocksEventReasons=None if old_driver else reasons,
        nvmlDeviceGetCurrentClocksThrottleReasons=reasons if old_driver else None,
    )
    assert card_condition(CUDA) == [f"clocks are held back: {name}" for name in names]
    assert snapshot()["throttle_reasons"] == names


def test_another_power_limit_than_the_card_s_own_or_the_catalogue_s(machine):
    machine(FakeGpu(power_limit_mw=250_000))
    assert card_condition(CUDA) == ["the power limit is 250 W, not the card's default 300 W"]
    chosen = CUDA | {"power_limit": 350}
    assert card_condition(chosen)[0] == "the power limit is 250 W, not the catalogue's 350 W"
    assert len(card_condition(chosen)) == 2
    assert len(card_condition(chosen | {"emulated": True})) == 1, "an emulated card's limit is not the host's"
    machine(FakeGpu(power_limit_mw=299_000))
    assert card_condition(CUDA) == [], "drivers round"


def test_only_strict_refuses_and_says_everything(machine):
    require_clean([], strict=True)
    require_clean(["a", "b"], strict=False)
    with pytest.raises(Refusal, match=r"strict=true and the card is not clean: a; b; wait, or strict=false"):
        require_clean(["a", "b"], strict=True)


def test_the_state_of_the_card_in_its_units(machine):
    machine(FakeGpu(power_mw=43_210))
    assert snapshot() == {
        "sm_clock_mhz": 210,
        "memory_clock_mhz": 405,
        "temperature_c": 31,
        "power_limit_w": 300.0,
        "power_draw_w": 43.21,
        "performance_state": "P8",
        "throttle_reasons": [],
    }


def test_what_the_driver_does_not_answer_is_absent(driver):
    driver(FakeGpu(power_mw=None, power_limit_mw=None))
    assert snapshot() == {}, "a binding without these functions"
    clean()
    answer(nvmlDeviceGetTemperature=None, nvmlDeviceGetPerformanceState=None, nvmlDeviceGetUtilizationRates=None)
    answer(nvmlDeviceGetCurrentClocksEventReasons=None, nvmlDeviceGetGraphicsRunningProcesses=None)
    assert snapshot() == {"sm_clock_mhz": 210, "memory_clock_mhz": 405}
    assert card_condition(CUDA) == []


def test_a_card_that_is_lost_on_the_way_raises_nothing(machine):
    gpu = FakeGpu(processes=[(FOREIGN, 1)])
    machine(gpu)
    assert len(card_condition(CUDA)) == 1
    gpu.errors = {name: 15 for name in vars(sys.modules["pynvml"]) if name.startswith("nvmlDevice")}
    assert card_condition(CUDA) == []
    assert snapshot() == {}


def test_the_first_visible_card_is_the_one_that_is_looked_at(machine):
    one, two = FakeGpu(uuid="GPU-1", processes=[(FOREIGN, 1)]), FakeGpu(uuid="GPU-2")
    machine(one, two, visible="1,0")
    assert card_condition(CUDA) == []
    machine(one, two, visible="0")
    assert len(card_condition(CUDA)) == 1


def test_a_slice_has_its_own_processes_and_its_card_s_clocks(machine):
    quiet, busy = FakeMig(uuid="MIG-1"), FakeMig(uuid="MIG-2", processes=[(FOREIGN, 1)], used_bytes=3_000_000_000)
    card = FakeGpu(mig=[quiet, busy], power_mw=90_000)
    machine(card, visible="MIG-1")
    assert card_condition(CUDA) == []
    assert snapshot()["power_draw_w"] == 90.0
    assert snapshot()["sm_clock_mhz"] == 210
    machine(card, visible="MIG-2")
    assert card_condition(CUDA) == [f"process {FOREIGN} uses the card (0.0 GB)"]


def test_the_driver_is_left_as_it_was_found(machine):
    machine()
    card_condition(CUDA)
    snapshot()
    nvml = sys.modules["pynvml"]
    with pytest.raises(nvml.NVMLError):
        nvml.nvmlDeviceGetCount()


def test_cuda_is_held_only_when_torch_has_opened_it(monkeypatch):
    monkeypatch.undo()
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert condition._holds_cuda() is False
    for opened in (False, True):
        cuda = SimpleNamespace(is_initialized=lambda opened=opened: opened)
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
        assert condition._holds_cuda() is opened
