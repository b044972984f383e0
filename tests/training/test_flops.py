"""Model FLOPs are counted over the matrix products alone, and set against a peak that the run measured."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from llm_at_home.metering import matmul
from llm_at_home.metering.matmul import dense_peak
from llm_at_home.records.schema import Reading
from llm_at_home.training.flops import ModelFlops, utilisation

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LINEAR = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # two of the four in attention have half the heads
HEAD = 100 * 32


def model():
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, num_key_value_heads=2, **SHAPE))


def test_every_weight_that_multiplies_is_counted_once():
    base = model()
    assert ModelFlops.of(base) == ModelFlops(0, LINEAR + HEAD, 2 * 32)
    base.requires_grad_(False)
    assert ModelFlops.of(base) == ModelFlops(LINEAR + HEAD, 0, 2 * 32)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    assert ModelFlops.of(adapted) == ModelFlops(LINEAR + HEAD, 2 * 4 * (32 + 32 + 64 + 32), 2 * 32)


@pytest.mark.parametrize("options", [{"trainable_token_indices": [1, 2]}, {"modules_to_save": ["lm_head"]}])
def test_an_output_layer_that_peft_trains_is_counted_once(options):
    base = LlamaForCausalLM(LlamaConfig(vocab_size=100, num_key_value_heads=2, tie_word_embeddings=True, **SHAPE))
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], **options))
    assert ModelFlops.of(adapted) == ModelFlops(LINEAR, HEAD + 2 * 4 * (32 + 32), 2 * 32)


def test_flops_are_those_that_torch_counts():
    """torch's counter takes attention for whole, and an input's gradient for needless where nothing before trains."""
    from torch.utils.flop_counter import FlopCounterMode

    base = model()
    base.config._attn_implementation = "eager"
    ids = torch.randint(0, 100, (2, 24))
    with FlopCounterMode(display=False) as counter:
        base(input_ids=ids, use_cache=False).logits.sum().backward()
    counted = ModelFlops.of(base).of_tokens(tokens=48, pairs=2 * 24 * 24)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_without_a_backward_pass_it_is_the_forward_one():
    flops = ModelFlops(frozen=100, trained=0, queries=10)
    assert flops.of_tokens(10, 55, backward=False) == 2 * 10 * 100 + 4 * 55 * 10
    assert flops.of_tokens(10, 55) == 2 * 2 * 10 * 100 + 3 * 4 * 55 * 10


def test_utilisation_needs_steps_and_a_peak():
    peak = Reading(2e-6, "TFLOP/s", "given")
    assert utilisation([1e6, 1e6], [1.0, 3.0], peak).value == pytest.approx(0.25)
    assert "no measured step" in utilisation([], [], peak).reason
    assert "too hot" in utilisation([1.0], [1.0], Reading.unknown("TFLOP/s", "too hot")).reason
    assert "not measured" in utilisation([1.0], [1.0], None).reason


def test_the_peak_is_measured_and_leaves_the_random_numbers_alone():
    state = torch.get_rng_state()
    peak = dense_peak("cpu", "float32")
    assert torch.equal(torch.get_rng_state(), state)
    assert 1e-4 < peak.value < 100
    assert peak.method == "fastest_matmul_of_768"


def test_a_peak_that_cannot_be_measured_says_why(monkeypatch):
    def fails(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "matmul", fails)
    assert dense_peak("cpu", "float32").reason == "out of memory"


@pytest.mark.parametrize(("seconds", "measured"), [([0.3] + [0.1] * 10, 8), ([3.0, 0.5], 1), ([0.9] * 3, 1)])
def test_slow_products_are_fewer(monkeypatch, seconds, measured):
    clock, done = [0.0], iter(seconds)
    monkeypatch.setattr(matmul, "now", lambda device: clock[0])
    monkeypatch.setattr(torch, "matmul", lambda a, b: clock.__setitem__(0, clock[0] + next(done)))
    peak = dense_peak("cpu", "float32")
    assert peak.n == measured
    assert next(done, None) is None, "fewer products than these were made"
    assert peak.value == pytest.approx(2 * 768**3 / min(seconds[-measured:]) / 1e12)
