from __future__ import annotations

import json

import pytest
from fake_nvml import FakeGpu, FakeMig

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


SMALL = FakeMig(uuid="MIG-11111111-0000-0000-0000-000000000001", memory_bytes=5_000_000_000)
LARGE = FakeMig(uuid="MIG-22222222-0000-0000-0000-000000000002", profile="3g.20gb", memory_bytes=20_000_000_000)
CUT = FakeGpu(name="NVIDIA M", uuid="GPU-dddd4444-0000-0000-0000-000000000004", mig=[SMALL, LARGE])


def test_a_slice_is_a_gpu_of_its_own_memory_with_its_card_s_chip(driver) -> None:
    driver(A, CUT, visible=LARGE.uuid)
    (gpu,) = present_gpus()
    assert (gpu.name, gpu.uuid, gpu.memory, gpu.mig) == ("NVIDIA M MIG 3g.20gb", LARGE.uuid, 20.0, True)
    assert (gpu.index, gpu.compute_capability, gpu.power_limit_watts) == (1, (8, 0), 300.0)
    assert json.loads(json.dumps(gpu.describe()))["mig"] is True


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (f"{LARGE.uuid},{SMALL.uuid}", [LARGE.uuid, SMALL.uuid]),
        (f"{SMALL.uuid},0", [SMALL.uuid, A.uuid]),
        ("MIG-", []),
        ("MIG-22222222", []),  # the driver knows whole names only
        (f"0,MIG-99999999,{SMALL.uuid}", [A.uuid]),
    ],
)
def test_slices_are_named_by_their_whole_uuid(driver, variable: str, expected: list[str]) -> None:
    driver(A, CUT, visible=variable)
    assert [gpu.uuid for gpu in present_gpus()] == expected


@pytest.mark.parametrize("variable", [None, "0", CUT.uuid, "GPU-dddd"])
def test_a_card_in_mig_mode_is_its_first_slice(driver, variable: str | None) -> None:
    driver(CUT, A, visible=variable)
    first = present_gpus()[0]
    assert (first.uuid, first.memory, first.mig) == (SMALL.uuid, 5.0, True)
    assert [gpu.mig for gpu in present_gpus()[1:]] == ([False] if variable is None else [])


def test_memory_that_the_driver_does_not_count_is_unknown_and_hides_nothing(driver) -> None:
    driver(A, FakeGpu(name="NVIDIA B", errors={"nvmlDeviceGetMemoryInfo": 3}), C)
    assert names() == ["A", "B", "C"]
    assert [gpu.memory for gpu in present_gpus()] == [24.0, None, 16.0]


def test_a_lost_card_hides_neither_the_others_nor_their_numbers(driver) -> None:
    lost = FakeGpu(uuid="GPU-bbbb", errors={"nvmlDeviceGetName": 15})
    driver(A, lost, C)
    assert [(gpu.index, gpu.name[-1]) for gpu in present_gpus()] == [(0, "A"), (2, "C")]
    driver(A, lost, C, visible="2,1,0")
    assert names() == ["C"]
