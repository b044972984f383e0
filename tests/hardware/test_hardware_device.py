from __future__ import annotations

import pytest
from fake_nvml import FakeGpu

from llm_at_home.errors import Refusal
from llm_at_home.hardware import device
from llm_at_home.hardware.device import resolve_device, resolve_dtype
from llm_at_home.hardware.present import present_gpus

AMPERE = FakeGpu(name="NVIDIA Ampere", capability=(8, 6))
TURING = FakeGpu(name="NVIDIA T4", capability=(7, 5))


@pytest.fixture
def torch_build(monkeypatch: pytest.MonkeyPatch):
    return lambda cuda: monkeypatch.setattr(device, "torch_can_use_gpu", lambda: cuda)


def group(wanted: str) -> dict[str, str]:
    return {"name": wanted, "device": wanted, "kept": "as it is"}


def test_auto_takes_the_first_visible_gpu(driver, torch_build) -> None:
    driver(TURING, AMPERE, visible="1,0")
    torch_build(True)
    assert resolve_device(group("auto")) == group("auto") | {"device": "cuda", "card": "NVIDIA Ampere"}
    assert resolve_device(group("cuda"))["card"] == "NVIDIA Ampere"


@pytest.mark.parametrize("case", ["no driver", "no gpu", "hidden", "cpu build"])
def test_auto_falls_back_to_the_cpu_and_cuda_is_refused_in_one_line(driver, torch_build, case: str) -> None:
    gpus = () if case == "no gpu" else (AMPERE,)
    driver(*gpus, present=case != "no driver", visible="" if case == "hidden" else None)
    torch_build(case != "cpu build")
    assert resolve_device(group("auto")) == group("auto") | {"device": "cpu", "card": None}
    with pytest.raises(Refusal, match=r"gpu=cuda needs a CUDA GPU.*use gpu=auto or gpu=cpu") as refusal:
        resolve_device(group("cuda"))
    assert "\n" not in str(refusal.value)
    assert ("CPU build" in str(refusal.value)) is (case == "cpu build")


def test_the_cpu_stays_the_cpu_where_a_gpu_is_present(driver, torch_build) -> None:
    driver(AMPERE)
    torch_build(True)
    assert resolve_device(group("cpu")) == group("cpu") | {"card": None}


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16"), ((12, 0), "bfloat16")],
)
def test_auto_is_bfloat16_where_the_card_has_it(driver, capability: tuple[int, int], expected: str) -> None:
    driver(FakeGpu(capability=capability))
    assert resolve_dtype("auto", "cuda") == expected


def test_auto_is_float32_on_the_cpu_where_any_dtype_is_allowed(driver) -> None:
    driver(TURING)
    assert resolve_dtype("auto", "cpu") == "float32"
    assert resolve_dtype("bfloat16", "cpu") == "bfloat16"


def test_bfloat16_is_refused_below_compute_capability_8(driver) -> None:
    driver(TURING, AMPERE)
    with pytest.raises(Refusal, match="NVIDIA T4 has no bfloat16: use dtype=float16"):
        resolve_dtype("bfloat16", "cuda")
    assert resolve_dtype("float16", "cuda") == "float16"
    assert resolve_dtype("bfloat16", "cuda", card=present_gpus()[1]) == "bfloat16"


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_an_unknown_dtype_is_refused_with_the_choices(driver, where: str) -> None:
    driver(AMPERE)
    with pytest.raises(Refusal, match=r"float8.*auto, float32, float16, bfloat16"):
        resolve_dtype("float8", where)
