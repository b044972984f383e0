from __future__ import annotations

import pytest
import yaml
from fake_nvml import FakeGpu, FakeMig

from llm_at_home.errors import Refusal
from llm_at_home.hardware import device
from llm_at_home.hardware.catalogue import CATALOGUE
from llm_at_home.hardware.device import check_kernel, resolve_device, resolve_dtype

AMPERE = FakeGpu(name="NVIDIA Ampere", capability=(8, 6))
TURING = FakeGpu(name="NVIDIA T4", capability=(7, 5))
HOPPER = FakeGpu(name="NVIDIA H100 80GB HBM3", capability=(9, 0), memory_bytes=85_520_000_000)
VOLTA = FakeGpu(name="Tesla V100-SXM2-32GB", capability=(7, 0), memory_bytes=34_360_000_000)
CPU = {"card": None, "emulated": False}


@pytest.fixture
def torch_build(monkeypatch: pytest.MonkeyPatch):
    return lambda cuda: monkeypatch.setattr(device, "torch_can_use_gpu", lambda: cuda)


def group(wanted: str) -> dict[str, str]:
    return {"name": wanted, "device": wanted, "kept": "as it is"}


def test_auto_takes_the_first_visible_gpu(driver, torch_build) -> None:
    driver(TURING, AMPERE, visible="1,0")
    torch_build(True)
    found = {"device": "cuda", "card": "NVIDIA Ampere", "emulated": False, "compute_capability": "8.6"}
    assert resolve_device(group("auto")) == group("auto") | found
    assert resolve_device(group("cuda"))["card"] == "NVIDIA Ampere"


@pytest.mark.parametrize("case", ["no driver", "no gpu", "hidden", "cpu build"])
def test_auto_falls_back_to_the_cpu_and_cuda_is_refused_in_one_line(driver, torch_build, case: str) -> None:
    gpus = () if case == "no gpu" else (AMPERE,)
    driver(*gpus, present=case != "no driver", visible="" if case == "hidden" else None)
    torch_build(case != "cpu build")
    assert resolve_device(group("auto")) == group("auto") | {"device": "cpu"} | CPU
    with pytest.raises(Refusal, match=r"gpu=cuda needs a CUDA GPU.*use gpu=auto or gpu=cpu") as refusal:
        resolve_device(group("cuda"))
    assert "\n" not in str(refusal.value)
    assert ("CPU build" in str(refusal.value)) is (case == "cpu build")


def test_the_cpu_stays_the_cpu_where_a_gpu_is_present(driver, torch_build) -> None:
    driver(AMPERE)
    torch_build(True)
    assert resolve_device(group("cpu")) == group("cpu") | CPU


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
    with pytest.raises(Refusal, match=r"NVIDIA T4 \(compute capability 7.5\) has no bfloat16: use dtype=float16"):
        resolve_dtype("bfloat16", "cuda")
    assert resolve_dtype("float16", "cuda") == "float16"


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_an_unknown_dtype_is_refused_with_the_choices(driver, where: str) -> None:
    driver(AMPERE)
    with pytest.raises(Refusal, match=r"float8.*auto, float32, float16, bfloat16"):
        resolve_dtype("float8", where)


def card(name: str, **changed) -> dict:
    return yaml.safe_load((CATALOGUE / f"{name}.yaml").read_text()) | changed


@pytest.fixture
def on(driver, torch_build):
    def install(*gpus: FakeGpu, **options) -> None:
        driver(*gpus, **options)
        torch_build(True)

    return install


def test_a_smaller_card_is_emulated_and_its_prices_do_not_reach_the_hash(on) -> None:
    on(HOPPER)
    assert resolve_device(card("t4")) == {
        "name": "t4",
        "device": "cuda",
        "card": "NVIDIA H100 80GB HBM3",
        "emulated": True,
        "memory": 15.63,
        "compute_capability": "7.5",
        "power_limit": 70,
    }


@pytest.mark.parametrize("title", ["Tesla T4", "NVIDIA T4", "T4"])
def test_the_card_itself_is_not_emulated_whatever_the_driver_calls_it(on, title: str) -> None:
    on(FakeGpu(name=title, capability=(7, 5), memory_bytes=16_106_127_360))
    assert resolve_device(card("t4"))["emulated"] is False
    assert resolve_device(card("t4", memory=8.0))["emulated"] is True, "less memory than it has is another card"


def test_a_card_of_another_name_is_emulated_at_the_same_size(on) -> None:
    on(HOPPER)
    assert resolve_device(card("h100"))["emulated"] is False
    assert resolve_device(card("a100_80gb"))["emulated"] is True


def test_a_larger_card_is_refused_for_runs(on) -> None:
    on(HOPPER)
    with pytest.raises(
        Refusal, match=r"gpu=h200 \(150.1 GB\) is larger than the NVIDIA H100 80GB HBM3 present"
    ) as refusal:
        resolve_device(card("h200"))
    assert "choose a smaller card or gpu=auto; the planner may use any card" in str(refusal.value)


def test_a_slice_is_as_large_as_it_is(on) -> None:
    on(FakeGpu(name="NVIDIA A100", mig=[FakeMig(uuid="MIG-1", memory_bytes=20_000_000_000)]), visible="MIG-1")
    assert resolve_device(card("t4"))["emulated"] is True
    with pytest.raises(Refusal, match=r"gpu=a100_40gb .* is larger than the NVIDIA A100 MIG 1g.5gb present"):
        resolve_device(card("a100_40gb"))


def test_a_present_card_of_unknown_size_can_stand_in_for_none(on) -> None:
    on(FakeGpu(name="NVIDIA GB10", errors={"nvmlDeviceGetMemoryInfo": 3}))
    assert resolve_device(group("auto"))["card"] == "NVIDIA GB10"
    with pytest.raises(Refusal, match="does not say how large the NVIDIA GB10 is: use gpu=auto"):
        resolve_device(card("t4"))


@pytest.mark.parametrize("case", ["no gpu", "cpu build"])
def test_a_card_without_a_gpu_is_refused_in_one_line(driver, torch_build, case: str) -> None:
    driver(*(() if case == "no gpu" else (HOPPER,)))
    torch_build(case == "no gpu")
    with pytest.raises(Refusal, match=r"gpu=t4 needs a CUDA GPU.*use gpu=auto or gpu=cpu") as refusal:
        resolve_device(card("t4"))
    assert "\n" not in str(refusal.value)


def test_a_card_on_the_cpu_is_the_cpu(on) -> None:
    on(HOPPER)
    assert resolve_device(card("h200", device="cpu")) == {"name": "cpu", "device": "cpu"} | CPU
    on()
    assert resolve_device(card("t4", device="auto")) == {"name": "cpu", "device": "cpu"} | CPU


def test_an_entry_that_makes_no_sense_is_refused(on) -> None:
    on(HOPPER)
    with pytest.raises(Refusal, match="gpu=t4: memory is -1"):
        resolve_device(card("t4", memory=-1))


def test_the_chosen_card_decides_the_dtype(on) -> None:
    on(HOPPER)
    t4, l4 = resolve_device(card("t4")), resolve_device(card("l4"))
    assert [resolve_dtype("auto", gpu) for gpu in (t4, l4)] == ["float16", "bfloat16"]
    with pytest.raises(Refusal, match=r"gpu=t4 \(compute capability 7.5\) has no bfloat16: use dtype=float16"):
        resolve_dtype("bfloat16", t4)
    assert resolve_dtype("float32", t4) == "float32"


def test_a_card_cannot_lend_what_the_present_one_lacks(on) -> None:
    on(VOLTA)
    l4 = resolve_device(card("l4"))
    assert resolve_dtype("auto", l4) == "float16"
    with pytest.raises(Refusal, match=r"Tesla V100-SXM2-32GB \(compute capability 7.0\) has no bfloat16"):
        resolve_dtype("bfloat16", l4)
    with pytest.raises(Refusal, match="Tesla V100-SXM2-32GB"):
        check_kernel(l4, (7, 5), "LLM.int8()")


def test_capabilities_compare_as_numbers(on) -> None:
    on(FakeGpu(name="NVIDIA GeForce RTX 5090", capability=(12, 0), memory_bytes=34_190_000_000))
    assert resolve_dtype("bfloat16", resolve_device(group("auto"))) == "bfloat16"
    check_kernel(resolve_device(card("rtx5090")), (8, 9), "fp8")


def test_a_kernel_that_the_chip_lacks_is_refused(on) -> None:
    on(HOPPER)
    v100 = resolve_device(card("v100"))
    with pytest.raises(Refusal, match=r"gpu=v100 \(compute capability 7.0\) cannot run LLM.int8\(\), which needs 7.5"):
        check_kernel(v100, (7, 5), "LLM.int8()")
    check_kernel(v100, (7, 0), "nf4")
    check_kernel(resolve_device(group("auto")), (9, 0), "Marlin")
    check_kernel(resolve_device(group("cpu")), (9, 0), "anything")
    on(VOLTA)
    with pytest.raises(Refusal, match=r"Tesla V100-SXM2-32GB \(compute capability 7.0\) cannot run"):
        check_kernel(resolve_device(group("cuda")), (7, 5), "LLM.int8()")
