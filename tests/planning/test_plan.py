"""The plan: what it says, what it refuses, how fast it answers, and what is chosen for a training run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_at_home.errors import Refusal
from llm_at_home.hardware.catalogue import load_catalogue
from llm_at_home.planning.plan import Target, make
from llm_at_home.planning.search import choose, largest
from llm_at_home.planning.training import predict_training
from llm_at_home.tasks import fast, planned

ROOT = Path(__file__).resolve().parents[2]
CARDS = load_catalogue()


@pytest.fixture
def plan(plain):
    def run(*words, gpu="rtx4090"):
        return make(plain("plan", *words), Target.of(CARDS[gpu]), list(CARDS.values()))

    return run


def test_parts_add_up_to_what_torch_reserves(plan):
    made = plan()
    total = sum(part.value for part in made.parts.values())
    assert total == pytest.approx(made.figures["predicted_torch_reserved_peak"].value)
    assert {"weights", "adapter", "gradients", "optimizer", "activations", "logits", "workspace"} <= set(made.parts)
    assert all(reading.method for reading in made.figures.values())


@pytest.mark.parametrize(("precision", "dtype", "saved"), [("bf16-mixed", "bfloat16", 4), ("16-mixed", "float16", 0)])
def test_a_fused_step_is_planned_as_the_run_makes_it(plain, precision, dtype, saved):
    words = ["model=llama2_7b", "quant=nf4", "memory=smallest", "data.max_length=256", f"dtype={dtype}"]
    words += ["callbacks.accumulation.steps=1"]
    config = plain("train", *words, "trainer.fused=true")
    assert predict_training(config).moment == "the optimizer's step"
    usual = predict_training({**config, "trainer": {**config["trainer"], "fused": False}})
    settled = fast.settle({**config, "trainer": {**config["trainer"], "precision": precision}})
    assert predict_training(config).allocated == predict_training(settled).allocated
    assert usual.allocated - predict_training(config).allocated == saved * usual.trained


def test_the_largest_batch_fits_and_one_more_does_not(plan, plain):
    size = int(plan().figures["largest_micro_batch"].value)
    card = CARDS["rtx4090"]
    config = {**plain("plan"), "dtype": "bfloat16"}
    for rows, expected in ((size, True), (size + 1, False)):
        config["data"]["batch_size"] = rows
        assert predict_training(config, card.compute_capability).fits(card.memory) is expected


def test_the_smallest_card_is_the_first_that_fits(plan):
    made = plan("model=llama2_13b", gpu="h100")
    smaller = [name for name, card in CARDS.items() if card.memory < CARDS[made.smallest_card].memory]
    assert smaller[-1] == "v100"  # the largest that is too small, and like the T4 one without bfloat16
    assert plan("model=llama2_13b", gpu=made.smallest_card).fits
    assert not plan("model=llama2_13b", "dtype=float16", gpu="v100").fits


def test_what_does_not_fit_is_told_what_would(plan):
    made = plan("data.batch_size=16")
    assert made.fits is False
    words = made.remedy.removeprefix("it fits with ").split(",")[0].split()
    assert {word.partition("=")[0] for word in words} == {
        "data.batch_size",
        "callbacks.accumulation.steps",
        "memory.checkpointing",
    }
    assert plan(*words).fits is True


def test_no_price_and_no_card_are_unknown_with_a_reason(plan, plain):
    assert plan().figures["run_cost_at_least"].value is None
    assert "rtx4090" in plan().figures["run_cost_at_least"].reason
    assert plan(gpu="h100").figures["run_cost_at_least"].unit == "USD"
    nowhere = make(plain("plan"), Target("auto", None, (9, 0)), list(CARDS.values()))
    assert nowhere.fits is None
    assert nowhere.figures["largest_micro_batch"].value is None


def test_experts_are_all_held(plan):
    parts = plan("model=mixtral_8x7b", gpu="h200").parts
    assert parts["weights"].value > 90  # nf4 leaves the experts, 45B parameters, in 16 bits


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["adapter=full"], "cannot train"),
        (["quant=none", "adapter=lora_loftq"], "needs quant=nf4"),
        (["task=fly"], "choose one of train, infer"),
        (["task=infer", "questions=home_bench"], "unknown length"),
        (["task=infer", "quant=gguf"], "llama.cpp"),
        (["model=custom", "model.source=some/model"], "model.architecture="),
    ],
)
def test_what_cannot_be_planned_is_refused(plan, words, said):
    with pytest.raises(Refusal, match=said):
        plan(*words)


@pytest.mark.slow
def test_every_quantization_and_adapter_is_planned(plan):
    for path in (ROOT / "conf" / "adapter").glob("*.yaml"):
        base = {"full": "none", "lora_pissa": "none"}.get(path.stem, "nf4")
        assert plan(f"adapter={path.stem}", f"quant={base}", gpu="h100").prediction.process > 4e9
    for path in (ROOT / "conf" / "quant").glob("*.yaml"):
        if path.stem not in ("gguf", "exl"):
            assert plan("task=infer", f"quant={path.stem}", gpu="h100").fits


def run(*words):
    command = [sys.executable, "-X", "importtime", "-m", "llm_at_home.planning", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ})


def test_the_command_imports_nothing_heavy_and_answers_in_json():
    done = run("gpu=rtx4090", "out=json")
    assert done.returncode == 0, done.stderr[-500:]
    said = json.loads(done.stdout)
    assert said["fits"] is True
    assert said["figures"]["predicted_torch_reserved_peak"]["method"] == "predicted"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "hydra" in imported
    assert not {"torch", "transformers", "peft", "mlflow"} & imported


def test_the_command_refuses_in_one_line():
    done = run("gpu=cpu")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if not line.startswith("import time")] == [
        "refused: the planner predicts the memory of a GPU: name one, such as gpu=rtx4090"
    ]


GPU = {"device": "cuda", "name": "some", "compute_capability": "8.9"}


@pytest.fixture
def training(plain):
    def make(*words, memory):
        config = plain("train", "model=llama2_7b", "quant=nf4", "trainer.micro_batch=auto", *words)
        return {**config, "gpu": {**GPU, "memory": memory}}

    return make


@pytest.mark.parametrize("memory", [9.5, 12.63, 25.38, 80.0])
def test_auto_keeps_the_effective_batch_and_recomputes_only_where_it_must(training, memory):
    config = training(memory=memory)
    settled = planned.settle(config)
    size, steps = settled["data"]["batch_size"], settled["callbacks"]["accumulation"]["steps"]
    checkpointing = settled["memory"]["checkpointing"]
    assert size * steps == 8
    assert "micro_batch" not in settled["trainer"]
    assert settled["planned"] == {"micro_batch": size, "accumulation": steps, "checkpointing": checkpointing}

    def process(micro_batch, recomputed):
        callbacks = {**settled["callbacks"], "accumulation": {"steps": 8 // micro_batch}}
        other = {**settled, "callbacks": callbacks, "memory": {**settled["memory"], "checkpointing": recomputed}}
        other["data"] = {**settled["data"], "batch_size": micro_batch}
        return planned.predicted(other)["predicted_process_memory_peak"].value

    usable = planned.USED * memory
    assert process(size, checkpointing) <= usable
    assert size == 8 or process(2 * size, checkpointing) > usable
    less = {"none": [], 4: ["none"], 2: ["none", 4], "full": ["none", 4, 2]}[checkpointing]
    assert all(process(1, recomputed) > usable for recomputed in less)


def test_auto_refuses_in_one_line_what_cannot_fit_and_says_what_would(training):
    with pytest.raises(Refusal, match="optimizer=adamw_8bit") as refused:
        planned.settle(training(memory=6.0))
    assert "\n" not in str(refused.value)
    with pytest.raises(Refusal, match="a smaller model or a larger gpu"):
        planned.settle(training("model=llama2_70b", memory=8.0))
    with pytest.raises(Refusal, match="nothing fits"):  # AdaLoRA has no rank of that name to make smaller
        planned.settle(training("adapter=adalora", memory=6.0))


def test_auto_needs_a_gpu_and_other_words_are_refused(plain):
    config = {**plain("train", "trainer.micro_batch=auto"), "gpu": {"device": "cpu"}}
    with pytest.raises(Refusal, match="needs a GPU"):
        planned.settle(config)
    config["trainer"]["micro_batch"] = 4
    with pytest.raises(Refusal, match=r"data\.batch_size=4"):
        planned.settle(config)


def test_a_choice_never_recomputes_less_than_was_asked(training):
    choice = choose(training("memory.checkpointing=full", memory=80.0), 80.0, (8, 9))
    assert choice.checkpointing == "full"


def test_what_the_planner_does_not_know_is_unknown_in_the_record(training):
    config = training(memory=80.0)
    config["model"]["architecture"]["model_type"] = "gpt2"
    found = planned.predicted(config)["predicted_torch_reserved_peak"]
    assert found.value is None
    assert "gpt2" in found.reason
    assert planned.predicted({**config, "gpu": {"device": "cpu"}}) == {}


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 64, 1000])
def test_the_largest_that_fits_is_found(limit):
    assert largest(lambda number: number <= limit, 64) == min(limit, 64)
