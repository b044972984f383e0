"""Recomputed layers and logits in parts change what is kept, and neither the loss nor a gradient."""

from __future__ import annotations

import functools
from pathlib import Path

import peft
import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM, LlamaConfig

from llm_at_home.errors import Refusal
from llm_at_home.models.chat import IGNORED
from llm_at_home.tasks import resolve
from llm_at_home.training.activations import ChunkedLoss, checkpoint_layers
from llm_at_home.training.module import CausalLMModule

CONF = Path(__file__).resolve().parents[2] / "conf"
LORA = functools.partial(peft.LoraConfig, task_type="CAUSAL_LM", r=4, target_modules="all-linear")
PROMPT = functools.partial(peft.PromptTuningConfig, task_type="CAUSAL_LM", num_virtual_tokens=3)


SHAPE = LlamaConfig(
    vocab_size=49152,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def load(folder=None, adapter=None):
    torch.manual_seed(0)
    if folder is None:  # needs no file, on a machine with a GPU alone
        model = AutoModelForCausalLM.from_config(SHAPE, dtype=torch.float32).train()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    if adapter is None:
        return model
    model = peft.get_peft_model(model, adapter())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)  # as after some steps: at zero the gradients of A are zero
    return model.train()


def batch():
    ids = torch.randint(10, 40000, (2, 30), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, 20:], labels[1, 20:], labels[0, :11] = 0, IGNORED, IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model, tokens=None, captured=False):
    loss = ChunkedLoss(model, tokens, captured) if tokens else None
    module = CausalLMModule(model, functools.partial(torch.optim.SGD, lr=0.1), chunked_loss=loss)
    loss = module.training_step(batch(), 0)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapter", [None, LORA, PROMPT], ids=["full", "lora", "prompt"])
@pytest.mark.parametrize(("every", "tokens"), [("full", None), (2, None), ("none", 7), ("full", 1000), (2, 1)])
@pytest.mark.parametrize("captured", [False, True])
def test_loss_and_gradients_stay(tiny_model, adapter, every, tokens, captured):
    wanted_loss, wanted = gradients(load(tiny_model, adapter))
    model = load(tiny_model, adapter)
    checkpoint_layers(model, every, captured=captured)
    loss, found = gradients(model, tokens, captured)
    torch.testing.assert_close(loss, wanted_loss)
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize(("every", "runs"), [("none", [1, 1]), ("full", [2, 2]), (2, [2, 1])])
def test_the_layers_named_run_twice(tiny_model, every, runs):
    model = load(tiny_model, LORA)
    assert checkpoint_layers(model, every) == sum(count - 1 for count in runs)
    counted = [0, 0]
    for index, layer in enumerate(model.get_base_model().model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: counted.__setitem__(index, counted[index] + 1))
    gradients(model)
    assert counted == runs


def test_no_more_logits_than_asked_for_are_made(tiny_model):
    model, rows = load(tiny_model, LORA), []
    model.get_base_model().lm_head.register_forward_hook(lambda *args: rows.append(args[2].shape[0]))
    gradients(model, tokens=8)
    looked_at = int((batch()["labels"][:, 1:] != IGNORED).sum())
    assert max(rows) == 8
    assert sum(rows) == 2 * looked_at  # forth and back, and none of a token that the loss does not look at
    assert isinstance(model.get_base_model().lm_head, torch.nn.Linear)


@pytest.mark.parametrize("captured", [False, True])
def test_a_batch_that_the_loss_looks_at_nowhere_has_a_loss_of_zero(tiny_model, captured):
    model = load(tiny_model, LORA)
    nothing = {**batch(), "labels": torch.full((2, 30), IGNORED)}
    loss = ChunkedLoss(model, 8, captured)(nothing)
    loss.backward()
    assert loss.item() == 0.0


def test_an_architecture_that_caps_its_logits_is_refused(tiny_model):
    model = load(tiny_model)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(Refusal, match=r"caps its logits \(final_logit_softcapping.*use memory.loss_tokens=null"):
        ChunkedLoss(model, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernel runs on GPUs alone")
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_liger_s_loss_and_gradients_are_torch_s(adapter):
    pytest.importorskip("liger_kernel")
    found = {}
    for name in ("torch", "liger"):
        model = load(None, adapter).cuda()
        module = CausalLMModule(model, None, chunked_loss=ChunkedLoss(model, None) if name == "liger" else None)
        loss = module.training_step({key: value.cuda() for key, value in batch().items()}, 0)
        loss.backward()
        found[name] = loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found["liger"][0], found["torch"][0], rtol=1e-4, atol=0)
    assert set(found["liger"][1]) == set(found["torch"][1])
    for name, gradient in found["torch"][1].items():
        torch.testing.assert_close(found["liger"][1][name], gradient, rtol=1e-2, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["memory.checkpointing=all"], "choose none, full, or a number"),
        (["memory.checkpointing=0"], "choose none, full, or a number"),
        (["memory.loss_tokens=0"], "give at least 1"),
        (["memory.loss=fused"], "choose torch or liger"),
        (["memory.loss=liger"], "use memory.loss=torch memory.loss_tokens=256"),
        (["memory.loss=liger", "memory.loss_tokens=256"], "use memory.loss_tokens=null"),
        (["adapter=prefix", "memory=smallest"], "use memory.checkpointing=none"),
        (["memory.offload=true"], "add memory.checkpointing=full"),
        (["memory.offload=true", "memory.checkpointing=2"], "use memory.offload=false"),
        (["adapter=prompt", "data.packing=true"], "use data.packing=false"),
        (["optimizer=paged_adamw_8bit"], "use optimizer=adamw_8bit"),
        (["optimizer=adamw_offload"], "use optimizer=adamw"),
    ],
)
def test_what_cannot_work_is_refused(words, why):
    # Random weights need no file, so that a machine which has no model refuses these for the same reason.
    words = ["logger=none", "gpu=cpu", "model=llama2_7b", "model.weights=random", "data=synthetic", *words]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = resolve.resolve("train", compose("train", words), words)
    with pytest.raises(Refusal, match=why) as refused:
        resolve.check("train", config)
    assert "\n" not in str(refused.value)


def test_a_run_in_the_smallest_memory_says_so(train_here, tiny_model, tmp_path):
    words = ["model=custom", f"model.source={tiny_model}", "limit=4", "adapter.r=4", "trainer.max_steps=3"]
    words += ["memory=smallest", "optimizer=adamw_8bit", "scheduler=cosine_restarts", "scheduler.T_0=2"]
    record = train_here([*words, "callbacks.accumulation.steps=1"], tmp_path / "run")
    assert record.counts["recomputed_layers"] == 2
    assert record.counts["optimizer_steps"] == 3


def test_a_packed_run_makes_the_steps_of_the_padded_one(train_here, tiny_model, tmp_path):
    steps = {}
    words = ["model=custom", f"model.source={tiny_model}", "limit=9", "adapter.r=4", "trainer.max_steps=2"]
    words += ["data.batch_size=3", "callbacks.accumulation.steps=1"]
    for packing in ("false", "true"):
        train_here([*words, f"data.packing={packing}"], tmp_path / packing)
        lines = (tmp_path / packing / "metrics.csv").read_text().splitlines()[1:]
        steps[packing] = [[float(figure) for figure in line.split(",")] for line in lines]
    for padded, packed in zip(steps["false"], steps["true"], strict=True):
        assert packed == pytest.approx(padded, rel=1e-3)


@pytest.mark.parametrize("quant", ["nf4", "int8", "gptq"])
def test_recomputing_a_quantized_base_leaves_its_gradients(tiny_model, quant):
    """On a CPU a 4-bit layer repacks its weights in a forward pass without gradients, which recomputing must not be."""
    from llm_at_home.adapters.attach import prepare_for_training
    from llm_at_home.quantization.base import load_base

    small = ["quant.group_size=32", "quant.calibration.limit=4", "quant.calibration.max_length=64"]
    words = ["model=custom", f"model.source={tiny_model}", f"quant={quant}", "gpu=cpu", "logger=none", "adapter.r=4"]
    words += small if quant == "gptq" else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = resolve.resolve("train", compose("train", words), words)
    adapter = {**config["adapter"], "init_lora_weights": False, "lora_dropout": 0.0}
    found = {}
    for every in ("none", "full"):
        base = load_base(config)
        torch.manual_seed(0)  # here, since the first loading makes a checkpoint and draws random numbers
        model = prepare_for_training(base, adapter)
        checkpoint_layers(model, every)
        found[every] = gradients(model)
    torch.testing.assert_close(found["full"][0], found["none"][0])
    for name, gradient in found["none"][1].items():
        torch.testing.assert_close(found["full"][1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)
        assert gradient.abs().sum() > 0, name
