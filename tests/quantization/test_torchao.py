"""torchao's weights are what was asked for, keep their error bounds, are counted truly, and train where they can."""

from __future__ import annotations

import copy

import pytest
import torch

from llm_at_home.adapters.attach import prepare_for_training
from llm_at_home.errors import Refusal
from llm_at_home.quantization import base, torchao
from llm_at_home.quantization.layers import linear_layers
from llm_at_home.quantization.size import size_readings

from .conftest import LORA, loadable, lora_gradients

INT8 = {"name": "int8_torchao", "method": "torchao", "bits": 8, "activation": "none"}
DYNAMIC = {**INT8, "activation": "dynamic"}
INT4 = {"name": "int4_torchao", "method": "torchao", "bits": 4, "group_size": 32, "algorithm": "tinygemm"}
DENSE = {"name": "none", "method": "dense", "bits": None}
SHAPE = {
    "model_type": "llama",
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS = [
    (INT8, "float32", "Linear[Int8Tensor]"),
    (DYNAMIC, "float32", "Linear[Int8Tensor, dynamic activations]"),
    (INT4, "bfloat16", "Linear[Int4OpaqueTensor]"),
]


def read_back(layer):
    """The weight that a layer really multiplies with, of shape (outputs, inputs): its product with the identity."""
    return layer(torch.eye(layer.in_features, dtype=layer.weight.dtype)).T.float()


def pairs(tiny_model, quant, dtype):
    """Each layer's dense weight and the quantized layer."""
    dense = dict(linear_layers(base.load_base(loadable(tiny_model, DENSE, dtype))))
    for name, layer in linear_layers(base.load_base(loadable(tiny_model, quant, dtype))):
        yield dense[name].weight.detach().float(), layer


@pytest.mark.parametrize(("quant", "dtype", "kind"), KINDS)
@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_the_layers_are_what_was_asked_for(tiny_model, quant, dtype, kind, weights):
    options = loadable(tiny_model, quant, dtype)
    if weights == "random":
        options["model"] |= {"weights": "random", "architecture": SHAPE}
    base.check(options)
    model = base.load_base(options)
    kernel = base.describe_kernel(model)
    assert kernel["layers"] == {kind: 14}
    assert kernel["backend"] == "torchao cpu"
    assert type(model.lm_head.weight) is torch.nn.Parameter, "the head stays as it is"
    with torch.inference_mode():
        assert torch.isfinite(model(torch.arange(20).reshape(1, 20)).logits).all()


def test_an_int8_weight_is_at_most_half_a_scale_off(tiny_model):
    for dense, layer in pairs(tiny_model, INT8, "float32"):
        scale = dense.abs().amax(1, keepdim=True) / 127.5
        torch.testing.assert_close(layer.weight.scale, scale)
        error = (read_back(layer).detach() - dense).abs()
        # The largest weight of a row lies half a step above the highest code.
        assert (error <= scale * 0.5 * (1 + 1e-3)).all()
        assert float(error.max()) > 0


def quantized_linear(weight, **settings):
    from torchao.quantization import quantize_

    layer = torch.nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    layer.weight.data = weight
    quantize_(layer, torchao.scheme({**INT4, **settings}, "cpu"))
    return layer


def half_a_step(weight, size):
    """Half the distance of neighbouring codes, and the weights of each group that shares it."""
    groups = weight.float().reshape(-1, size)
    return (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)) / 15 / 2, groups


@pytest.mark.parametrize("size", [32, 64, 128])
def test_an_int4_weight_is_at_most_half_a_scale_of_its_group_off(size):
    torch.manual_seed(0)
    weight = torch.randn(48, 256)
    half, groups = half_a_step(weight, size)
    error = (read_back(quantized_linear(weight, group_size=size)).detach().reshape(-1, size) - groups).abs()
    assert (error <= half * (1 + 1e-4)).all()
    assert float((error / half).max()) > 0.99


def test_an_int4_weight_of_a_model_is_as_close_as_bfloat16_lets_it_be(tiny_model):
    for dense, layer in pairs(tiny_model, INT4, "bfloat16"):
        half, groups = half_a_step(dense, INT4["group_size"])
        error = (read_back(layer).detach().reshape(groups.shape) - groups).abs()
        # Codes are chosen in bfloat16 too: up to sixteen steps, each operation to 2^-8, add an eighth of a step.
        assert (error <= half * 1.25).all()


def test_half_quadratic_scales_err_less_in_the_norm_that_they_minimise(tiny_model):
    torch.manual_seed(0)
    # A heavy tail, for which the range is a bad scale.
    weight = torch.distributions.StudentT(3).sample((64, 128)).to(torch.bfloat16)

    def error(algorithm):
        layer = quantized_linear(weight.clone(), group_size=128, algorithm=algorithm)
        return float((read_back(layer).detach() - weight.float()).abs().pow(0.7).mean())

    assert error("hqq") < error("tinygemm")


def test_bits_per_weight_count_scales_and_zero_points(tiny_model):
    def bits(quant, dtype="float32"):
        return size_readings(base.load_base(loadable(tiny_model, quant, dtype)))["bits_per_weight"].value

    # A row of 64 inputs, in one layer of seven of 128, keeps a float32 scale and an 8-bit zero point.
    rows = 64 + 32 + 32 + 64 + 128 + 128 + 64
    weights = 64 * (64 + 32 + 32 + 64 + 128 + 128) + 128 * 64
    assert bits(INT8) == bits(DYNAMIC) == pytest.approx(8 + (32 + 8) * rows / weights)
    # A group keeps a scale and a zero point of 16 bits each.
    assert bits(INT4, "bfloat16") == pytest.approx(4 + 32 / 32)
    assert bits({**INT4, "group_size": 64}, "bfloat16") == pytest.approx(4 + 32 / 64)


def test_the_size_of_the_model_is_the_sum_of_its_parts(tiny_model):
    readings = {
        name: size_readings(base.load_base(loadable(tiny_model, quant, "bfloat16")))
        for name, quant in (("dense", DENSE), ("int4", INT4))
    }
    weights = 2 * (64 * (64 + 32 + 32 + 64 + 128 + 128) + 128 * 64)
    saved = weights * (16 - 5) / 8 / 1e9
    assert readings["dense"]["model_size"].value - readings["int4"]["model_size"].value == pytest.approx(saved)


def dense_copy(model):
    """The same model with the values that its int8 layers stand for."""
    dense = copy.deepcopy(model)
    for name, layer in list(linear_layers(dense)):
        linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight.data = layer.weight.dequantize()
        dense.set_submodule(name, linear)
    return dense


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_gradients_on_int8_equal_those_of_its_dequantized_copy(tiny_model, weights):
    options = loadable(tiny_model, INT8, adapter=LORA)
    if weights == "random":
        options["model"] |= {"weights": "random", "architecture": SHAPE}
    quantized = base.load_base(options)
    dense = dense_copy(quantized)
    expected, found = lora_gradients(dense, LORA), lora_gradients(quantized, LORA)
    assert len(expected) == 28
    for (name, a), (_, b) in zip(expected.items(), found.items(), strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-4, name


def test_an_adapter_on_int8_learns(tiny_model):
    model = prepare_for_training(base.load_base(loadable(tiny_model, INT8, adapter=LORA)), LORA)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(100, 140).reshape(2, 20)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize(("quant", "dtype"), [(DYNAMIC, "float32"), (INT4, "bfloat16")])
def test_what_is_refused_for_training_passes_no_gradient_indeed(tiny_model, quant, dtype):
    layer = next(layer for _, layer in linear_layers(base.load_base(loadable(tiny_model, quant, dtype))))
    x = torch.randn(3, 64, dtype=layer.weight.dtype, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|derivative"):
        layer(x).sum().backward()


GPU = {"name": "t", "device": "cuda", "card": "T", "emulated": False, "compute_capability": "9.0"}
OLD_GPU = {**GPU, "compute_capability": "7.5"}


@pytest.mark.parametrize(
    ("quant", "more", "words"),
    [
        ({**INT8, "bits": 2}, {}, "quant.bits=2"),
        ({**INT8, "activation": "static"}, {}, "choose one of none, dynamic"),
        (DYNAMIC, {"adapter": LORA}, "quant.activation=none"),
        (INT8, {"adapter": {"trains": "all"}}, "adapter=lora"),
        ({**INT4, "algorithm": "gptq"}, {}, "tinygemm, hqq"),
        ({**INT4, "group_size": 256}, {}, "choose one of 32, 64, 128"),
        ({**INT4, "group_size": 128}, {}, "layers of 64 inputs: give a divisor of 64"),
        (INT4, {"dtype": "float32"}, "use dtype=bfloat16"),
        (INT4, {"gpu": GPU, "dtype": "float16"}, "use dtype=bfloat16"),
        (INT4, {"gpu": OLD_GPU, "dtype": "float16"}, "needs 8.0"),
        (INT4, {"adapter": LORA}, "quant=nf4 or quant=int8_torchao"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tiny_model, quant, more, words):
    with pytest.raises(Refusal, match=words) as refusal:
        base.check({**loadable(tiny_model, quant, "bfloat16"), **more})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("quant", "more"),
    [(INT8, {"adapter": LORA}), (DYNAMIC, {"adapter": {"trains": "nothing"}}), (INT4, {}), (INT4, {"gpu": GPU})],
)
def test_what_can_work_is_let_through(tiny_model, quant, more):
    base.check({**loadable(tiny_model, quant, "bfloat16"), **more})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("weights", ["pretrained", "random"])
@pytest.mark.parametrize(
    ("quant", "kind"),
    [
        (INT8, "Linear[Int8Tensor]"),
        (DYNAMIC, "Linear[Int8Tensor, dynamic activations]"),
        (INT4, "Linear[Int4TilePackedTo4dTensor]"),
    ],
)
def test_on_a_gpu_the_product_is_that_of_the_weights(tiny_model, quant, kind, weights):
    options = loadable(tiny_model, quant, "bfloat16", gpu={"name": "cuda", "device": "cuda"})
    if weights == "random":
        options["model"] |= {"weights": "random", "architecture": SHAPE}
    model = base.load_base(options)
    assert base.describe_kernel(model)["layers"] == {kind: 14}
    assert all(tensor.device.type == "cuda" for tensor in model.parameters())
    if weights == "pretrained":
        dense = base.load_base({**options, "quant": DENSE})
        ids = torch.arange(100, 140, device="cuda").reshape(2, 20)
        with torch.inference_mode():
            difference = (model(ids).logits - dense(ids).logits).float().norm() / dense(ids).logits.float().norm()
        assert 0 < float(difference) < 0.2
