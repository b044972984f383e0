"""A kernel is chosen by what it can do, by name, and a wrong name is refused."""

from __future__ import annotations

import pytest

from llm_at_home.errors import Refusal
from llm_at_home.quantization.gptq_kernels import KERNELS, Need, choose

H100, T4 = (9, 0), (7, 5)


def kernel(algorithm="gptq", device="cpu", bits=(4,), dtype="bfloat16", **more):
    named = more.pop("named", None)
    return choose(algorithm, Need(device, bits, dtype, **more), named)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "gptq_torch_aten"),
        ({"bits": (3,)}, "gptq_torch"),
        ({"bits": (4, 8)}, "gptq_torch"),
        ({"trains": True}, "gptq_torch"),
        ({"device": "cuda", "capability": H100}, "gptq_marlin"),
        ({"device": "cuda", "capability": H100, "bits": (8,)}, "gptq_marlin"),
        ({"device": "cuda", "capability": H100, "symmetric": False}, "gptq_triton"),
        ({"device": "cuda", "capability": H100, "bits": (2,)}, "gptq_triton"),
        ({"device": "cuda", "capability": H100, "bits": (3,)}, "gptq_torch"),
        ({"device": "cuda", "capability": T4, "dtype": "float16"}, "gptq_triton"),
        ({"device": "cuda", "capability": H100, "trains": True}, "gptq_torch"),
        ({"device": "cuda", "capability": H100, "group_size": 16}, "gptq_triton"),
        ({"algorithm": "awq"}, "awq_torch_aten"),
        ({"algorithm": "awq", "symmetric": False, "device": "cuda", "capability": H100}, "awq_marlin"),
        ({"algorithm": "awq", "device": "cuda", "capability": T4, "dtype": "float16"}, "awq_gemm_triton"),
        ({"algorithm": "awq", "trains": True}, "awq_torch"),
    ],
)
def test_the_first_that_can_is_chosen(options, expected):
    assert kernel(**options) == expected


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"named": "gptq_marlin"}, "needs gpu=cuda"),
        ({"named": "gptq_marlin", "device": "cuda", "symmetric": False}, "quant.sym=true"),
        ({"named": "gptq_marlin", "device": "cuda", "bits": (3,)}, "4 and 8 bits and not 3"),
        ({"named": "gptq_torch", "dtype": "float32"}, "not in float32"),
        ({"named": "gptq_torch_aten", "trains": True}, "no gradients"),
        ({"named": "machete"}, "choose one of"),
        ({"dtype": "float32"}, "not in float32"),
        ({"algorithm": "exl3"}, "needs gpu=cuda"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(options, reason):
    with pytest.raises(Refusal, match=reason) as refused:
        kernel(**options)
    assert "\n" not in str(refused.value)


def test_the_table_is_what_the_installed_gptqmodel_says_of_its_kernels():
    from llm_at_home.quantization.gptq_output import library_output

    with library_output():
        from gptqmodel import BACKEND
        from gptqmodel.quantization.config import FORMAT, METHOD
        from gptqmodel.utils.importer import get_kernel_for_backend

        formats = {"gptq": (METHOD.GPTQ, FORMAT.GPTQ), "awq": (METHOD.AWQ, FORMAT.GEMM)}
        for name, ours in KERNELS.items():
            if ours.algorithm == "exl3":
                continue
            theirs = get_kernel_for_backend(BACKEND(name), *formats[ours.algorithm])
            assert set(ours.bits) <= set(theirs.SUPPORTS_BITS), name
            assert {str(dtype).removeprefix("torch.") for dtype in theirs.SUPPORTS_DTYPES} >= set(ours.dtypes), name
            assert ours.symmetric_only == (False not in theirs.SUPPORTS_SYM), name
            assert ours.act_order == (True in theirs.SUPPORTS_DESC_ACT), name
            assert set(ours.group_sizes) <= set(theirs.SUPPORTS_GROUP_SIZE), name
            assert theirs.SUPPORTS_TRAINING or not ours.trains, name
            devices = {str(device.value) for device in theirs.SUPPORTS_DEVICES}
            assert ours.device is None or ours.device in devices, name
