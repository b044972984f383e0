"""fp16 gradients are unscaled before they are averaged and clipped, and precisions that cannot work are refused."""

from __future__ import annotations

import functools

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm_at_home.errors import Refusal
from llm_at_home.tasks import resolve
from llm_at_home.training.callbacks.clipping import GradientClipping

SHORT = "data.max_length=96"  # a CPU's 16 bits are slow


@pytest.mark.parametrize("scale", [2.0**6, 2.0**12])
def test_fp16_is_unscaled_before_it_is_clipped(fit, short_vocabulary, half_precision, scale):
    one_step = {"batch_size": 1, "accumulate": 4, "steps": 1}
    wanted = fit(**one_step, callbacks=[GradientClipping(0.3)])
    module = fit(**one_step, callbacks=[GradientClipping(0.3)], plugins=half_precision(scale))
    # The norm from before clipping is the gradient's own, whatever the scale.
    assert module.history[0]["gradient_norm"] == pytest.approx(wanted.history[0]["gradient_norm"], rel=0.02)
    assert module.history[0]["gradient_norm"] > 0.3
    start = AutoModelForCausalLM.from_pretrained(short_vocabulary, dtype=torch.float32)
    pairs = zip(module.model.parameters(), start.parameters(), strict=True)
    moved = sum(float(((a - b).detach() ** 2).sum()) for a, b in pairs) ** 0.5
    assert moved == pytest.approx(0.5 * 0.3, rel=1e-3)  # SGD at 0.5 moves by rate times clipped norm


def test_fp16_steps_whose_gradients_overflow_are_left_out(fit, short_vocabulary, half_precision):
    scaler = half_precision(2.0**40)
    module = fit(batch_size=4, accumulate=1, steps=1, callbacks=[GradientClipping(0.3)], plugins=scaler)
    start = AutoModelForCausalLM.from_pretrained(short_vocabulary, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(module.model.parameters(), start.parameters(), strict=True))
    assert scaler[0].scaler.get_scale() == 2.0**39


CARD = functools.partial(dict, device="cuda", card="NVIDIA A100", emulated=False)


@pytest.mark.parametrize(
    ("words", "gpu", "why"),
    [
        (["trainer.precision=16-true"], {}, "choose one of 32-true, bf16-mixed, 16-mixed, bf16-true"),
        (["dtype=float16"], {}, "use dtype=float32 or bfloat16"),
        (["trainer.precision=16-mixed"], {}, "use dtype=float32 or bfloat16"),
        (["dtype=bfloat16", "trainer.precision=32-true"], {}, "use dtype=float32"),
        (["trainer.precision=bf16-true"], {}, "use dtype=bfloat16"),
        (["dtype=bfloat16", "trainer.precision=16-mixed"], CARD(compute_capability="8.0"), "use bf16-mixed"),
        (["dtype=float16", "adapter=full"], CARD(compute_capability="8.0"), "dtype=float32 trainer.precision=16-mixed"),
        (["trainer.precision=bf16-mixed"], CARD(compute_capability="7.5"), "has no bfloat16"),
        (["quant=nf4", "dtype=bfloat16", "trainer.precision=bf16-true"], {}, "use trainer.precision=bf16-mixed"),
    ],
)
def test_a_precision_that_cannot_work_is_refused(resolved, words, gpu, why):
    with pytest.raises(Refusal, match=why) as refused:
        resolve.check("train", resolved(words, **gpu))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "gpu"),
    [
        (["trainer.precision=bf16-mixed"], {}),
        (["dtype=bfloat16", "trainer.precision=bf16-true"], {}),
        (["dtype=bfloat16", "adapter=full"], {}),
        (["trainer.precision=16-mixed", "adapter=full"], CARD(compute_capability="7.5")),
        (["dtype=float16"], CARD(compute_capability="7.5")),
    ],
)
def test_a_precision_that_works_is_not(resolved, words, gpu):
    resolve.check("train", resolved(words, **gpu))


def test_bfloat16_trains_on_the_cpu(train_here, tiny_model, tmp_path):
    words = ["model=custom", f"model.source={tiny_model}", "adapter.r=4", "limit=4", "trainer.max_steps=2", SHORT]
    train_here([*words, "dtype=bfloat16", "trainer.precision=bf16-true"], tmp_path / "run")
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "words",
    [["adapter=ia3", "quant=nf4"], ["adapter=ia3", "quant=int8"], ["adapter=adalora", "quant=int8"]],
    ids=" ".join,
)
def test_a_quantized_base_keeps_its_16_bits_outside_autocast(train_here, tiny_model, tmp_path, words):
    words = ["model=custom", f"model.source={tiny_model}", "limit=4", "trainer.max_steps=4", SHORT, *words]
    record = train_here([*words, "dtype=bfloat16", "held_out=1"], tmp_path / "run")
    assert record.readings["start_difference"].value < 1e-3
    assert record.quality["perplexity_test"].value > 1


def test_normalisations_of_a_16_bit_base_train_at_small_rates(train_here, tiny_model, tmp_path):
    """In bfloat16, whose next number after 1 is 1.0078, they would stay what they were."""
    words = ["model=custom", f"model.source={tiny_model}", "adapter=layernorm", "limit=4", "trainer.max_steps=2", SHORT]
    words += ["optimizer.lr=1e-4", "callbacks.accumulation.steps=1", "dtype=bfloat16", "held_out=1"]
    record = train_here(words, tmp_path / "run")
    assert record.readings["start_difference"].value == 0.0
    assert record.quality["perplexity_test"].value > 1
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all((tensor != 1).any() for tensor in saved.values())
    further = [*words, f"adapter_path={tmp_path}/run"]
    train_here(further, tmp_path / "further")
    again = load_file(tmp_path / "further" / "adapter" / "adapter_model.safetensors")
    assert all((again[name] != tensor).any() for name, tensor in saved.items())
