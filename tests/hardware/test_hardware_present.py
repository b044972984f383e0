from __future__ import annotations

import json

import pytest
from fake_nvml import FakeGpu

from llm_at_home.hardware import present
from llm_at_home.hardware.present import present_gpus

A = FakeGpu(name="NVIDIA A", uuid="GPU-aaaa1111-0000-0000-0000-000000000001", memory_bytes=24_000_000_000)
B = FakeGpu(name="NVIDIA B", uuid="GPU-aaaa2222-0000-0000-0000-000000000002", capability=(7, 5))
C = FakeGpu(name="NVIDIA C", uuid="GPU-cccc3333-0000-0000-0000-000000000003", power_limit_mw=None)


def names() -> list[str]:
    return [gpu.name[-1] for gpu in present_gpus()]


def test_a_gpu_is_described_in_the_records_units(driver) -> None:
    driver(A, C)
    first, second = present_gpus()
    assert (first.index, first.name, first.memory, first.power_limit_watts) == (0, "NVIDIA A", 24.0, 300.0)
    assert second.power_limit_watts is None
    described = json.loads(json.dumps(first.describe()))
    assert described["compute_capability"] == "8.0"
    assert described["driver"] == "580.65.06"


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, "ABC"),
        ("0", "A"),
        ("2,0", "CA"),
        (" 1 , 2 ", "BC"),
        (A.uuid, "A"),
        (f"{C.uuid},{A.uuid}", "CA"),
        ("GPU-cccc", "C"),
        ("GPU-aaaa2", "B"),
        ("", ""),
        ("-1", ""),
        ("-1,0", ""),
        ("0,7,1", "A"),
        ("NoDevFiles", ""),
        ("none", ""),
        ("MIG-aaaa1111", ""),
        ("GPU-aaaa", ""),  # of two cards: ambiguous
        ("1,GPU-aaaa,2", "B"),
    ],
)
def test_the_visible_gpus_in_their_order(driver, variable: str | None, expected: str) -> None:
    driver(A, B, C, visible=variable)
    assert names() == list(expected)


def test_no_driver_is_no_gpu(driver) -> None:
    driver(A, present=False)
    assert present_gpus() == ()


def test_a_driver_without_a_gpu_is_no_gpu(driver) -> None:
    driver()
    assert present_gpus() == ()


def test_the_driver_is_left_as_it_was_found(driver) -> None:
    import sys

    driver(A)
    present_gpus()
    pynvml = sys.modules["pynvml"]
    with pytest.raises(pynvml.NVMLError):
        pynvml.nvmlDeviceGetCount()


def test_the_driver_is_asked_once(driver) -> None:
    gpus = driver(A)
    assert len(present_gpus()) == 1
    gpus.append(B)
    assert len(present_gpus()) == 1


def test_cuda_is_told_to_number_cards_as_the_driver_does(driver, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    driver(A, B)
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    present_gpus()
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    present_gpus.cache_clear()
    present_gpus()
    assert os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST", "a user's own choice stays"


@pytest.mark.parametrize(("version", "usable"), [("2.13.0+cpu", False), ("2.13.0", True), ("2.13.0+cu130", True)])
def test_a_cpu_build_of_torch_is_known_by_its_version(monkeypatch, version: str, usable: bool) -> None:
    monkeypatch.setattr(present.metadata, "version", lambda name: version)
    assert present.torch_can_use_gpu() is usable
