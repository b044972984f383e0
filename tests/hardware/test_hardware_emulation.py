from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest
from fake_nvml import FakeGpu

from llm_at_home.errors import Refusal
from llm_at_home.hardware.emulation import cap_memory

TOTAL = 84_900_000_000  # as CUDA has it; the driver counts a little more
CONTEXT = 600_000_000
OTHERS = 5_000_000_000
T4 = {"name": "t4", "device": "cuda", "card": "NVIDIA H100 80GB HBM3", "emulated": True, "memory": 15.63}


class FakeCuda:
    """``torch.cuda``, as far as it is asked, over the fake driver's card; the first real call makes the context."""

    def __init__(self, gpu: FakeGpu | None, initialised: bool = False, reserved: int = 0) -> None:
        self.gpu, self.initialised, self.reserved = gpu, initialised, reserved
        self.used, self.fractions = OTHERS, []
        self.pid_is_visible = True
        if initialised:
            self._open()

    def _open(self) -> None:
        self.used += CONTEXT + self.reserved
        if self.gpu is not None:
            self.gpu.used_bytes += CONTEXT + self.reserved
            if self.pid_is_visible:
                self.gpu.processes.append((os.getpid(), CONTEXT + self.reserved))

    def is_initialized(self) -> bool:
        return self.initialised

    def init(self) -> None:
        self.was_initialised = self.initialised
        self.initialised = True

    def mem_get_info(self, device: int) -> tuple[int, int]:
        assert self.initialised
        if not self.was_initialised:
            self._open()
        return TOTAL - self.used, TOTAL

    def memory_reserved(self, device: int) -> int:
        return self.reserved

    def set_per_process_memory_fraction(self, fraction: float, device: int) -> None:
        assert isinstance(fraction, float)  # torch refuses anything else
        assert 0 <= fraction <= 1
        self.fractions.append(fraction)


@pytest.fixture
def cuda(driver, monkeypatch):
    def install(gpu: FakeGpu | None = None, **options) -> FakeCuda:
        gpu = gpu or FakeGpu(memory_bytes=85_500_000_000, used_bytes=OTHERS)
        driver(gpu)
        fake = FakeCuda(gpu, **options)
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=fake))
        return fake

    return install


def test_torch_may_hold_the_card_s_memory_without_the_context(cuda):
    fake = cuda()
    done = cap_memory(T4)
    assert done == {
        "emulated": "t4",
        "host_card": "NVIDIA H100 80GB HBM3",
        "memory_gb": 15.63,
        "context_gb": 0.6,
        "context_method": "nvml_process",
        "limit_gb": 15.03,
    }
    assert [round(fraction * TOTAL) for fraction in fake.fractions] == [15_030_000_000]


def test_where_process_ids_are_hidden_the_card_s_difference_is_the_context(cuda):
    fake = cuda()
    fake.pid_is_visible = False
    done = cap_memory(T4)
    assert (done["context_method"], done["context_gb"], done["limit_gb"]) == ("nvml_difference", 0.6, 15.03)


def test_without_the_driver_s_figures_others_count_as_context(cuda):
    fake = cuda(FakeGpu(errors={"nvmlDeviceGetMemoryInfo": 3, "nvmlDeviceGetComputeRunningProcesses": 3}))
    done = cap_memory(T4)
    assert (done["context_method"], done["context_gb"], done["limit_gb"]) == ("cuda_total_less_free", 5.6, 10.03)
    assert len(fake.fractions) == 1


@pytest.mark.parametrize("visible", [True, False])
def test_what_torch_already_holds_is_not_context(cuda, visible):
    fake = cuda(initialised=True, reserved=1_000_000_000)
    if not visible:
        fake.gpu.processes.clear()
        fake.gpu.errors = {"nvmlDeviceGetMemoryInfo": 3}
        fake.used -= OTHERS
    assert cap_memory(T4)["context_gb"] == 0.6


def test_an_open_context_is_never_measured_as_a_difference(cuda):
    fake = cuda(initialised=True)
    fake.gpu.processes.clear()
    assert cap_memory(T4)["context_method"] == "cuda_total_less_free"


def test_a_card_of_the_same_size_is_capped_by_what_is_there(cuda):
    fake = cuda()
    assert cap_memory(T4 | {"memory": 84.98})["limit_gb"] == 84.3
    assert fake.fractions[0] < 1


@pytest.mark.parametrize("gpu", [{"device": "cpu"}, T4 | {"emulated": False}])
def test_nothing_is_touched_without_emulation(cuda, gpu):
    fake = cuda()
    assert cap_memory(gpu) is None
    assert not fake.initialised
    assert fake.fractions == []


def test_a_card_that_the_context_fills_is_refused(cuda):
    fake = cuda()
    with pytest.raises(Refusal, match=r"gpu=t4: the CUDA context of 0.60 GB leaves no memory"):
        cap_memory(T4 | {"memory": 0.5})
    assert fake.fractions == []
