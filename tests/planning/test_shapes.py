"""Weights, trained parameters and optimizer states against published counts, PEFT's own and committed measurements."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from llm_at_home.adapters.attach import prepare_for_training, trainable_parameters
from llm_at_home.errors import Refusal
from llm_at_home.planning.adapters import trained_parameters, trained_tensors
from llm_at_home.planning.shape import Shape
from llm_at_home.planning.state import optimizer_memory
from llm_at_home.planning.weights import bits_per_weight, model_bytes

ROOT = Path(__file__).resolve().parents[2]
# As their makers publish them (safetensors' own count on the hub).
PUBLISHED = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "mistral_7b": 7_248_023_552,
    "mixtral_8x7b": 46_702_792_704,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_7b": 7_615_616_512,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
}
ADAPTERS = sorted(path.stem for path in (ROOT / "conf" / "adapter").glob("*.yaml"))


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_a_model_has_its_published_number_of_weights(plain, name, count):
    assert Shape.of(plain("train", f"model={name}")["model"]).parameters == count


@pytest.mark.parametrize("name", ["mixtral_8x7b", "qwen2_5_7b"])
def test_transformers_makes_a_model_of_that_shape(plain, name):
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = plain("train", f"model={name}")["model"]["architecture"]
    config = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


def test_an_unknown_architecture_is_refused():
    with pytest.raises(Refusal, match="is a gpt2"):
        Shape.from_architecture("other", {"model_type": "gpt2"})


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("model", [pytest.param("smollm2_135m", marks=pytest.mark.slow), "qwen2_5_0_5b"])
def test_an_adapter_trains_as_many_parameters_as_peft_says(plain, adapter, model):
    from transformers import AutoConfig, AutoModelForCausalLM

    from llm_at_home.models.source import shape

    config = plain("train", f"model={model}", f"adapter={adapter}")
    if config["adapter"].get("init_lora_weights"):
        config["adapter"]["init_lora_weights"] = True  # as many, and no decomposition to wait for
    config["adapter"].pop("loftq", None)
    architecture = shape(config["model"]) | {"num_hidden_layers": 2}
    config["model"] |= {"architecture": dict(architecture), "weights": "random"}
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture.pop("model_type"), **architecture))
    made = prepare_for_training(base, config["adapter"], None, 100)
    found = Shape.of(config["model"])
    assert trained_parameters(found, config["adapter"]) == trainable_parameters(made)
    sizes = Counter(parameter.numel() for parameter in made.parameters() if parameter.requires_grad)
    assert {size: count for size, count in trained_tensors(found, config["adapter"]).items() if count} == sizes


def records_with_size():
    for path in sorted((ROOT / "results" / "h100").glob("table1*/*/record.json")):
        record = json.loads(path.read_text())
        yield pytest.param(record, id=f"{path.parts[-3]}/{path.parts[-2]}")


@pytest.mark.parametrize("record", records_with_size())
def test_a_quantized_model_takes_what_was_measured(record):
    config, readings = record["config"], record["readings"]
    shape = Shape.of(config["model"])
    bits = bits_per_weight(shape, config["quant"], config["dtype"])
    assert bits == pytest.approx(readings["bits_per_weight"]["value"], rel=0.002)
    size = model_bytes(shape, config["quant"], config["dtype"]) / 1e9
    assert size == pytest.approx(readings["model_size"]["value"], rel=0.002)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("rtn", 4.375), ("int8_torchao", 8.0586), ("int4_torchao", 4.5), ("gptq", 4.25), ("awq", 4.3125), ("fp4", 4.5)],
)
def test_every_method_has_its_bits(plain, name, bits):
    config = plain("infer", "model=smollm2_135m", f"quant={name}")
    assert bits_per_weight(Shape.of(config["model"]), config["quant"], "bfloat16") == pytest.approx(bits, abs=0.05)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "sgd"])
def test_an_optimizer_keeps_what_is_predicted(plain, name):
    from hydra.utils import instantiate

    sizes = [300, 4096, 100_000]
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    group = plain("train", f"optimizer={name}")["optimizer"]
    optimizer = instantiate(group)(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tables = ("qmap1", "qmap2")  # shared by all tensors
    kept = [v for state in optimizer.state.values() for k, v in state.items() if k not in (*tables, "step")]
    measured = sum(tensor.numel() * tensor.element_size() for tensor in kept if isinstance(tensor, torch.Tensor))
    assert optimizer_memory(group, Counter(sizes), 4).state == pytest.approx(measured, rel=0.005)


@pytest.mark.parametrize(
    ("name", "state", "host"),
    [
        # Scales, in float32 for each 256 values, and the moments of small tensors stay on the card.
        ("paged_adamw_8bit", 8 * 300 + 2 * 4096 + (4096 + 100_000) * 8 / 256, 2 * 100_000),
        ("adamw_offload", 0, 12 * (300 + 4096 + 100_000)),
    ],
)
def test_what_an_optimizer_keeps_on_the_host_is_counted_there(plain, name, state, host):
    found = optimizer_memory(plain("train", f"optimizer={name}")["optimizer"], Counter([300, 4096, 100_000]), 2)
    assert (found.state, found.host) == (pytest.approx(state), host)


def test_a_checkpoint_with_bits_of_its_own_for_each_layer_is_unknown(plain):
    config = plain("plan", "quant=gptq_mixed")
    quant = {**config["quant"], "bits": None, "target_bits": None}  # as a published one is completed
    with pytest.raises(Refusal, match="bits of their own"):
        model_bytes(Shape.of(config["model"]), quant, "float16")
