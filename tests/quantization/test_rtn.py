"""Round-to-nearest keeps its error bounds, packs to exactly its bits, and computes with what it stores."""

from __future__ import annotations

import itertools

import pytest
import torch

from llm_at_home.errors import Refusal
from llm_at_home.quantization import base, rtn, rtn_linear
from llm_at_home.quantization.size import size_readings

from .conftest import loadable

RTN = {"name": "rtn", "method": "rtn", "bits": 4, "scheme": "asymmetric", "granularity": "group", "group_size": 32}
SETTINGS = list(itertools.product(rtn.BITS, rtn.SCHEMES, rtn.GRANULARITIES))


@pytest.fixture
def linear():
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 40, bias=True)
    layer.weight.data[3] *= 20  # an outlier channel
    layer.weight.data[5] = layer.weight.data[5].abs()  # one that lies on one side of zero
    layer.weight.data[7] = 0
    return layer


@pytest.mark.parametrize(("bits", "scheme", "granularity"), SETTINGS)
def test_no_weight_is_further_off_than_half_a_step(linear, bits, scheme, granularity):
    quantized = rtn_linear.RTNLinear(linear, bits, scheme, granularity, 32)
    error = (quantized.dequantized() - linear.weight).abs().reshape(quantized.rows, -1)
    assert (error <= quantized.scale.abs() * 0.5 * (1 + 1e-4) + 1e-7).all()
    ranges = linear.weight.reshape(quantized.rows, -1)
    if scheme == "asymmetric":
        spread = ranges.amax(1).clamp(min=0) - ranges.amin(1).clamp(max=0)
        expected = spread / (2**bits - 1)
    else:
        expected = ranges.abs().amax(1) / (2 ** (bits - 1) - 1)
    some = expected > 0
    torch.testing.assert_close(quantized.scale.flatten()[some], expected[some])


@pytest.mark.parametrize("bits", rtn.BITS)
def test_codes_survive_packing_and_take_exactly_their_bits(bits):
    codes = torch.randint(0, 2**bits, (8 * 37,), dtype=torch.int16)
    planes = rtn_linear.pack(codes, bits)
    assert torch.equal(rtn_linear.unpack(planes), codes)
    assert planes.numel() * 8 == codes.numel() * bits


def test_weights_on_a_grid_are_read_back_exactly():
    grid = torch.arange(-8, 8).float().repeat(4, 2) * 0.25
    layer = torch.nn.Linear(32, 4, bias=False)
    layer.weight.data = grid
    assert torch.equal(rtn_linear.RTNLinear(layer, 4, "asymmetric", "group", 32).dequantized(), grid)


def test_finer_groups_and_more_bits_err_less(linear):
    def error(bits, granularity):
        quantized = rtn_linear.RTNLinear(linear, bits, "asymmetric", granularity, 32)
        return float((quantized.dequantized() - linear.weight).norm())

    assert error(8, "group") < error(4, "group") < error(3, "group") < error(2, "group")
    assert error(4, "group") < error(4, "channel") < error(4, "tensor")


def test_the_product_and_its_gradient_are_those_of_the_weight_read_back(linear):
    quantized = rtn_linear.RTNLinear(linear, 3, "symmetric", "group", 32)
    x = torch.randn(5, 96, requires_grad=True)
    y = quantized(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, quantized.dequantized(), linear.bias))
    y.sum().backward()
    torch.testing.assert_close(x.grad, quantized.dequantized().sum(0).expand(5, -1))


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 32), (8, 64)])
def test_bits_per_weight_count_the_scales(tiny_model, bits, group_size):
    model = base.load_base(loadable(tiny_model, {**RTN, "bits": bits, "group_size": group_size}))
    assert base.describe_kernel(model)["layers"] == {"RTNLinear": 14}
    # a float32 scale and an eight-bit zero point for each group
    assert size_readings(model)["bits_per_weight"].value == pytest.approx(bits + (32 + 8) / group_size)


def test_bits_per_weight_of_the_dense_model_are_its_dtype_s(tiny_model):
    dense = {"name": "none", "method": "dense", "bits": None}
    readings = size_readings(base.load_base(loadable(tiny_model, dense)))
    assert readings["bits_per_weight"].value == 32
    assert readings["bits_per_weight_whole_model"].value == pytest.approx(32, rel=1e-3)
    assert readings["model_size"].value == pytest.approx(
        (tiny_model / "model.safetensors").stat().st_size / 1e9, rel=1e-2
    )


def test_bitsandbytes_scales_and_tables_are_counted(tiny_model):
    def bits(nested):
        quantization = {
            "_target_": "transformers.BitsAndBytesConfig",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": nested,
        }
        quant = {"name": "nf4", "method": "bitsandbytes", "bits": 4, "config": quantization}
        return size_readings(base.load_base(loadable(tiny_model, quant)))["bits_per_weight"].value

    plain, nested = bits(False), bits(True)
    assert 4.5 < plain < 4.7  # a float32 scale for 64 weights, and the table of sixteen values
    # an eight-bit scale for 64 weights; in so small a model the second table weighs more than it saves
    assert 4.125 < nested < 6
    assert bits(True) == nested, "the same model has the same size each time"


@pytest.mark.parametrize(
    ("quant", "said"),
    [
        ({"bits": 5}, "quant.bits=5"),
        ({"scheme": "odd"}, "symmetric, asymmetric"),
        ({"granularity": "row"}, "tensor, channel, group"),
        ({"group_size": 20}, "multiple of 8"),
        ({"group_size": None}, "multiple of 8"),
    ],
)
def test_what_does_not_exist_is_refused(tiny_model, quant, said):
    with pytest.raises(Refusal, match=said):
        base.check(loadable(tiny_model, {**RTN, **quant}))
    with pytest.raises(Refusal, match="does not divide"):
        base.load_base(loadable(tiny_model, {**RTN, "group_size": 48}))
