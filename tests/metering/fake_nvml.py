"""A stand-in for ``pynvml`` that behaves as NVIDIA's documents: counted initialisation, millijoules, errors."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from llm_at_home.hardware.present import present_gpus

NOT_SUPPORTED = "Not Supported"


@dataclass
class FakeGpu:
    name: str = "NVIDIA Fake"
    uuid: str = "GPU-00000000-0000-0000-0000-000000000000"
    memory_bytes: int = 16_000_000_000
    capability: tuple[int, int] = (8, 0)
    power_limit_mw: int | None = 300_000
    energy_mj: int | None = 1_000_000  # None: before Volta there is no counter


def fake_nvml(gpus: list[FakeGpu], driver: bool = True) -> types.ModuleType:
    """A module for ``sys.modules['pynvml']``; the GPUs may be changed while it is in use."""
    module = types.ModuleType("pynvml")
    state = {"initialised": 0}

    class NVMLError(Exception):
        pass

    class NVMLError_Uninitialized(NVMLError):
        pass

    class NVMLError_LibraryNotFound(NVMLError):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    class NVMLError_NotFound(NVMLError):
        pass

    def nvmlInit() -> None:
        if not driver:
            raise NVMLError_LibraryNotFound("NVML Shared Library Not Found")
        state["initialised"] += 1

    def nvmlShutdown() -> None:
        ready()
        state["initialised"] -= 1

    def ready() -> None:
        if not state["initialised"]:
            raise NVMLError_Uninitialized("Uninitialized")

    def needs_init(function):
        def checked(*arguments):
            ready()
            return function(*arguments)

        return checked

    def by_uuid(uuid: str | bytes) -> FakeGpu:
        text = uuid.decode() if isinstance(uuid, bytes) else uuid
        for gpu in gpus:
            if gpu.uuid == text:
                return gpu
        raise NVMLError_NotFound("Not Found")

    def supported(value):
        if value is None:
            raise NVMLError_NotSupported(NOT_SUPPORTED)
        return value

    functions = {
        "nvmlDeviceGetCount": lambda: len(gpus),
        "nvmlDeviceGetHandleByIndex": lambda index: gpus[index],
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetName": lambda gpu: gpu.name,
        "nvmlDeviceGetUUID": lambda gpu: gpu.uuid,
        "nvmlDeviceGetMemoryInfo": lambda gpu: types.SimpleNamespace(total=gpu.memory_bytes, used=0, free=0),
        "nvmlDeviceGetCudaComputeCapability": lambda gpu: gpu.capability,
        "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: supported(gpu.power_limit_mw),
        "nvmlDeviceGetTotalEnergyConsumption": lambda gpu: supported(gpu.energy_mj),
        "nvmlSystemGetDriverVersion": lambda: "580.65.06",
    }
    for name, function in functions.items():
        setattr(module, name, needs_init(function))
    for thing in (NVMLError, NVMLError_LibraryNotFound, NVMLError_NotSupported, NVMLError_NotFound):
        setattr(module, thing.__name__, thing)
    module.nvmlInit, module.nvmlShutdown = nvmlInit, nvmlShutdown
    return module


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[FakeGpu]]]:
    """``driver(gpu, gpu, visible="1")`` puts a machine with these GPUs in place; the GPUs may be changed later."""

    def install(*gpus: FakeGpu, visible: str | None = None, present: bool = True) -> list[FakeGpu]:
        listed = list(gpus)
        monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(listed, present))
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        present_gpus.cache_clear()
        return listed

    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    yield install
    present_gpus.cache_clear()
