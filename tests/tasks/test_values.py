"""Values that would end in a traceback after everything was loaded, or change a run without a word, are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from llm_at_home.errors import Refusal
from llm_at_home.tasks import resolve

CONF = Path(__file__).resolve().parents[2] / "conf"
T4 = {"device": "cuda", "card": "Tesla T4", "emulated": False, "compute_capability": "7.5"}


def checked(task, words, **gpu):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = resolve.resolve(task, compose(task, ["gpu=cpu", *words]), words)
    config["gpu"] |= gpu
    resolve.check(task, config)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["data.batch_size=0"], "data.batch_size=0"),
        (["data.batch_size=1.5"], "data.batch_size=1.5"),
        (["data.max_length=-5"], "data.max_length=-5"),  # which would cut the last five tokens off
        (["trainer.max_steps=1.5"], "trainer.max_steps=1.5"),
        (["trainer.max_steps=null"], "trainer.max_steps=None"),
        (["trainer.max_epochs=0"], "leaves nothing to train"),
        (["limit=1.5"], "limit=1.5"),
        (["limit=some"], "limit=some"),
        (["seed=-1"], "seed=-1"),
        (["timeout_s=-1"], "null for none"),
        (["grace_s=null"], "0 for none"),
        (["seed=null"], "seed=None"),
        (["callbacks.checkpoints.every_n_steps=0"], "every_n_steps=0"),
        (["callbacks.checkpoints.keep=-1"], "keep=-1"),  # which would keep none
        (["callbacks.divergence.window=0"], "window=0"),
        (["callbacks.clipping.max_norm=-1"], "max_norm=-1"),  # which would turn the gradient round
        (["data.packing=off"], "data.packing=off is text"),
        (["data.packing=maybe"], "give true or false"),
        (["trainer.fused=off"], "trainer.fused=off"),
        (["model.trust_remote_code=no"], "trust_remote_code=no is text"),
        (["+trainer.gradient_clip_val=1"], "use callbacks.clipping.max_norm"),
        (["+trainer.accumulate_grad_batches=2"], "use callbacks.accumulation.steps"),
        (["scheduler=wsd", "trainer.max_steps=10"], "num_decay_steps=20 do not fit trainer.max_steps=10"),
        (["~optimizer"], "choose one of conf/optimizer"),
        (["~adapter"], "choose one of conf/adapter"),
        (["adapter.trains=both"], "choose one of adapter, all, nothing"),
        (["+adapter.init_lora_weights=eva"], "starts from data"),
        (["adapter=adalora", "~callbacks.rank_allocation"], "leave it in"),
        (["adapter=adalora", "adapter.target_r=96"], "leaves no rank to lower"),
        (["adapter=adalora", "adapter.deltaT=0"], "deltaT=0"),
        (["adapter=oft", "adapter.oft_block_size=30"], "does not divide layers of 576 inputs: give a divisor of 192"),
    ],
    ids=str,
)
def test_what_training_would_stumble_over_is_refused(words, why):
    with pytest.raises(Refusal, match=why) as refused:
        checked("train", words)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        ["scheduler=wsd"],
        ["~scheduler", "~callbacks"],
        ["trainer.max_epochs=2"],
        ["~callbacks.clipping", "~callbacks.checkpoints", "~callbacks.divergence"],
        ["adapter=oft", "adapter.target_modules=[q_proj]", "adapter.oft_block_size=36"],
    ],
    ids=str,
)
def test_what_can_be_is_not(words):
    checked("train", words)


def test_weights_that_no_scaler_takes_are_not_trained_in_float16():
    words = ["+adapter.modules_to_save=[lm_head]"]
    with pytest.raises(Refusal, match=r"dtype=float32 trainer\.precision=16-mixed"):
        checked("train", [*words, "dtype=float16"], **T4)
    checked("train", [*words, "dtype=float32", "trainer.precision=16-mixed"], **T4)


@pytest.mark.parametrize(("task", "words"), [("infer", []), ("quantize", ["quant=gptq"]), ("evaluate", ["task=text"])])
def test_a_word_is_no_switch_for_any_command(task, words):
    with pytest.raises(Refusal, match="give true or false"):
        checked(task, [*words, "model.trust_remote_code=off"])


@pytest.mark.parametrize(
    ("task", "words", "why"),
    [
        ("infer", ["repeats=x"], "repeats=x"),
        ("infer", ["samples=1.5"], "samples=1.5"),
        ("infer", ["engine.batch_size=2.5"], "engine.batch_size=2.5"),
        ("evaluate", ["task=text", "text.batch_size=0"], "text.batch_size=0"),
        ("evaluate", ["task=text", "text.max_new_tokens=few"], "text.max_new_tokens=few"),
        ("evaluate", ["task=text", "engine.temperature=-1"], "engine.temperature=-1"),
        ("evaluate", ["task=fidelity", "fidelity.max_length=2.5"], "fidelity.max_length=2.5"),
    ],
    ids=str,
)
def test_what_answering_would_stumble_over_is_refused(task, words, why):
    with pytest.raises(Refusal, match=f"{why} .*give"):
        checked(task, words)
