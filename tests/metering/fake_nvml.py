"""Machines for tests: ``driver(FakeGpu(), ...)`` puts the fake NVML in this process's place and in its children's."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llm_at_home.hardware.present import present_gpus

FOLDER = Path(__file__).parent / "fake"


@dataclass
class FakeMig:
    """A MIG slice; memory and processes are its own."""

    uuid: str = "MIG-00000000-0000-0000-0000-000000000000"
    profile: str = "1g.5gb"
    memory_bytes: int = 5_000_000_000
    used_bytes: int = 0
    processes: list[tuple[int, int | None]] = field(default_factory=list)


@dataclass
class FakeGpu:
    name: str = "NVIDIA Fake"
    uuid: str = "GPU-00000000-0000-0000-0000-000000000000"
    memory_bytes: int = 16_000_000_000
    capability: tuple[int, int] = (8, 0)
    power_limit_mw: int | None = 300_000
    energy_mj: int | None = 1_000_000  # None: before Volta there is no counter
    power_mw: int | None = 50_000  # None: the card gives no power
    # Steps are (monotonic clock in seconds, level from then on): power in W, which moves the counter too.
    power_steps: list[tuple[float, float]] = field(default_factory=list)
    update_seconds: float = 0.1
    average_seconds: float = 0.0  # 1 on Ampere (but not GA100) and later
    counter_moves: bool = True
    used_bytes: int = 0
    processes: list[tuple[int, int | None]] = field(default_factory=list)  # None: not available
    mig: list[FakeMig] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)  # function name: NVML's code


def fake_nvml(gpus: list[FakeGpu], driver: bool = True) -> types.ModuleType:
    """A module for ``sys.modules['pynvml']``; the GPUs may be changed while it is in use."""
    spec = importlib.util.spec_from_file_location("pynvml", FOLDER / "pynvml.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.GPUS, module.DRIVER = gpus, driver
    return module


def write_state(path: Path, gpus: list[FakeGpu]) -> None:
    """What other processes see of the GPUs, from now on."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps([dataclasses.asdict(gpu) for gpu in gpus]))
    new.replace(path)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., list[FakeGpu]]]:
    """``driver(gpu, gpu, visible="1")`` puts a machine with these GPUs in place.

    The GPUs may be changed later; ``driver.publish()`` tells other processes of it.
    """
    state = tmp_path / "nvml.json"
    listed: list[FakeGpu] = []

    def install(*gpus: FakeGpu, visible: str | None = None, present: bool = True) -> list[FakeGpu]:
        listed[:] = gpus
        monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(listed, present))
        install.publish()
        monkeypatch.setenv("FAKE_NVML_STATE", str(state))
        path = os.environ.get("PYTHONPATH")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(FOLDER), path))))
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        present_gpus.cache_clear()
        return listed

    install.publish = lambda: write_state(state, listed)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    yield install
    present_gpus.cache_clear()
