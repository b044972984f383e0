"""The planner's activations against the tensors that are really alive after a forward pass, and at the peak."""

from __future__ import annotations

import pytest

from llm_at_home.planning.activations import layer_memory, loss_memory
from llm_at_home.planning.shape import Shape
from llm_at_home.planning.training import batch_of, predict_training

CASES = {
    "LoRA": [],
    "LoRA on nf4": ["quant=nf4"],
    "LoKr on nf4": ["adapter=lokr", "quant=nf4"],
}
FURTHER_CASES = {
    "AdaLoRA in float32": ["adapter=adalora", "dtype=float32"],
    "every weight": ["adapter=full"],
    "LoRA on int8": ["quant=int8"],
    "LoRA in float32": ["dtype=float32"],
    "AdaLoRA": ["adapter=adalora"],
    "LoKr near the square root": ["adapter=lokr", "adapter.decompose_factor=-1", "adapter.r=8"],
    "DoRA": ["adapter=dora"],
    "DoRA on nf4": ["adapter=dora", "quant=nf4"],
    "LoHa": ["adapter=loha"],
    "PEFT's LoHa": ["adapter=loha", "adapter.implementation=peft"],
    "OFT": ["adapter=oft"],
    "VeRA": ["adapter=vera"],
    "bottleneck": ["adapter=bottleneck"],
    "IA3": ["adapter=ia3"],
    "IA3 on nf4": ["adapter=ia3", "quant=nf4"],
    "layer norms": ["adapter=layernorm"],
}
PEAKS = [(["quant=nf4", "memory.loss_tokens=32", "memory.checkpointing=full"], {"num_key_value_heads": 2})]
FURTHER_PEAKS = [
    ([], {"num_key_value_heads": 2}),
    (["quant=nf4", "memory.checkpointing=full"], {}),
    (["quant=nf4", "memory.checkpointing=2"], {}),
    (["memory.loss_tokens=32"], {}),
    (["memory.checkpointing=full", "dtype=float32"], {}),
]
# Few tokens and a small vocabulary: the update's own backward pass is the peak.
OF_LOHA = [["adapter.r=8"], ["adapter.r=32"], ["adapter.r=8", "adapter.implementation=peft"]]
OF_LOHA += [[*words, "memory.checkpointing=full"] for words in OF_LOHA]
OF_LOHA += [["adapter.r=8", "dtype=float32"], ["adapter.r=32", "dtype=float32"]]


@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_a_layer_keeps_what_is_predicted(measure, words):
    check_layer(measure, words)


@pytest.mark.slow
@pytest.mark.parametrize("words", FURTHER_CASES.values(), ids=FURTHER_CASES)
def test_a_layer_of_every_method_keeps_what_is_predicted(measure, words):
    check_layer(measure, words)


def check_layer(measure, words):
    config, deep = measure(3, 1, 96, *words)
    _, shallow = measure(2, 1, 96, *words)
    predicted = layer_memory(config, Shape.of(config["model"]), batch_of(config)).kept
    assert predicted == pytest.approx(deep.kept - shallow.kept, rel=0.01)


@pytest.mark.parametrize(("words", "shape"), PEAKS, ids=str)
def test_the_peak_of_a_pass_is_what_is_predicted(measure, words, shape):
    check_peak(measure, words, shape)


@pytest.mark.slow
@pytest.mark.parametrize(("words", "shape"), FURTHER_PEAKS, ids=str)
def test_further_peaks_are_what_is_predicted(measure, words, shape):
    check_peak(measure, words, shape)


def test_loha_s_peak_is_of_the_way_that_it_is_computed(measure):
    words = ["adapter=loha", "adapter.r=4", "memory.checkpointing=full"]
    check_peak(measure, words, {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 1376}, rows=1, tokens=16)


@pytest.mark.slow
@pytest.mark.parametrize("words", OF_LOHA, ids=str)
def test_loha_s_peak_is_of_every_way_that_it_is_computed(measure, words):
    check_peak(measure, ["adapter=loha", *words], {"vocab_size": 64}, rows=1, tokens=16)


def check_peak(measure, words, shape, rows=2, tokens=96):
    # SGD's step takes nothing: the peak is the pass's own.
    config, measured = measure(4, rows, tokens, "optimizer=sgd", *words, **shape)
    parts = predict_training(config).parts
    cublas = 2 * 32 * 2**20
    predicted = parts["activations"] + parts["logits"] + parts["workspace"] - cublas
    assert predicted == pytest.approx(measured.peak, rel=0.05)


def test_logits_in_parts_are_held_for_that_many_tokens_only(plain):
    whole, part = plain("train", "data.batch_size=4"), plain("train", "data.batch_size=4", "memory.loss_tokens=100")
    shape = Shape.of(whole["model"])
    assert loss_memory(whole, shape, batch_of(whole)).logits == 16 * loss_memory(part, shape, batch_of(part)).logits


@pytest.mark.slow
def test_a_padded_batch_keeps_masks(measure):
    words = ["data.source=handbook"]
    config, deep = measure(3, 2, 256, *words, padded=True)
    _, shallow = measure(2, 2, 256, *words, padded=True)
    predicted = layer_memory(config, Shape.of(config["model"]), batch_of(config)).kept
    assert predicted == pytest.approx(deep.kept - shallow.kept, rel=0.02)
