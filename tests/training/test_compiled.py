"""Compiled decoder layers: the losses of the same run without them, few graphs, and names that stay as they are."""

from __future__ import annotations

import csv
import functools
import importlib.util
import os
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm_at_home.errors import Refusal
from llm_at_home.records import store
from llm_at_home.tasks import fast, resolve
from llm_at_home.training import regional
from llm_at_home.training.shapes import Shapes

LENGTHS = (5, 40, 12, 33, 21, 17, 9)
CARD = {"device": "cuda", "card": "NVIDIA A100", "emulated": False, "compute_capability": "8.0"}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No graph of another test; traced and differentiated as in a run, but not made into C++, which takes minutes."""
    torch._dynamo.reset()
    monkeypatch.setattr(regional, "BACKEND", "aot_eager")
    monkeypatch.setenv(regional.CACHE, os.environ.get(regional.CACHE, ""))
    monkeypatch.delenv(regional.CACHE)


def with_lora(model, **options):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **options))


def test_losses_names_and_the_number_of_graphs(fit, short_vocabulary):
    adamw = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    order = {"batch_size": 3, "accumulate": 2, "steps": 6, "lengths": LENGTHS, "optimizer": adamw}
    wanted = fit(**order, prepare=with_lora)
    made = []

    def compiled(model):
        adapted = with_lora(model)
        made.append(regional.CompiledLayers(adapted, shapes=2))
        return adapted

    shapes = Shapes(rows=3, longest=40, lengths=2)
    found = fit(**order, prepare=compiled, shapes=shapes)
    assert [s["loss"] for s in found.history] == pytest.approx([s["loss"] for s in wanted.history], rel=1e-5)
    start = with_lora(AutoModelForCausalLM.from_pretrained(short_vocabulary)).state_dict()
    ends = [{name.removeprefix("model."): value for name, value in run.state_dict().items()} for run in (wanted, found)]
    moved = sum(float((ends[0][name] - start[name]).square().sum()) for name in ends[0])
    apart = sum(float((ends[0][name] - ends[1][name]).square().sum()) for name in ends[0])
    assert apart < 1e-4 * moved
    # Two lengths, the first layer, whose input takes no gradient, and the other.
    assert made[0].counts() == {"compiled_layers": 2, "compiled_graphs": 4, "graph_breaks": 0}
    assert made[0].notes() == []
    assert made[0].readings()["compile_time"].value > 0
    assert list(found.state_dict()) == list(wanted.state_dict())


def test_what_comes_after_training_compiles_nothing(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    compiled = regional.CompiledLayers(model, shapes=1)
    with torch.no_grad():
        wanted = model(torch.arange(100, 107)[None]).logits
        graphs = compiled.counts()["compiled_graphs"]
        assert graphs > 0
        compiled.end()
        torch.testing.assert_close(model(torch.arange(100, 107)[None]).logits, wanted)
        model(torch.arange(100, 113)[None])
    assert compiled.counts()["compiled_graphs"] == graphs


@pytest.mark.parametrize("nested", [False, True])
def test_a_4_bit_layer_is_compiled_whole_with_bitsandbytes_own_gradient(nested):
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    layer = Linear4bit(64, 96, bias=False, compute_dtype=torch.float32, compress_statistics=nested, quant_type="nf4")
    weight = torch.randn(96, 64)
    layer.weight = Params4bit(weight, requires_grad=False, compress_statistics=nested, quant_type="nf4").to("cpu")
    layer.support_avx512bf16_for_cpu = False
    x = torch.randn(5, 64, requires_grad=True)

    def forward(x):
        return (torch.nn.functional.silu(layer(x)) ** 2).sum()

    (wanted,) = torch.autograd.grad(forward(x), x)
    # fullgraph raises where anything is cut.
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True, dynamic=False)
    (found,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert wanted.abs().max() > 0.1


def test_a_model_without_decoder_layers_is_refused():
    with pytest.raises(Refusal, match=r"use trainer\.compile=off"):
        regional.CompiledLayers(torch.nn.Linear(2, 2), shapes=1)


def test_compiled_code_is_kept_in_the_project_s_cache_unless_the_user_has_a_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LLM_AT_HOME_CACHE", str(tmp_path))
    regional.keep_compiled()
    assert os.environ[regional.CACHE] == str(tmp_path / "inductor")
    monkeypatch.setenv(regional.CACHE, "/mine")
    regional.keep_compiled()
    assert os.environ[regional.CACHE] == "/mine"


FAST = ["trainer=fast", "trainer.micro_batch=null"]


def test_layers_that_an_old_torch_would_not_free_are_compiled_on_request_alone(resolved, monkeypatch):
    recomputed = [*FAST, "quant=nf4", "memory.checkpointing=full"]
    assert fast.is_compiled(resolved(recomputed))
    monkeypatch.setattr(fast.importlib.metadata, "version", lambda name: "2.11.0+cu130")
    assert not fast.is_compiled(resolved(recomputed))
    assert "before torch 2.12" in fast.compile_obstacle(resolved(recomputed))
    assert fast.is_compiled(resolved([*FAST, "quant=nf4"]))
    assert fast.is_compiled(resolved([*FAST, "memory.checkpointing=full"]))
    assert fast.is_compiled(resolved([*recomputed, "trainer.compile=layers"]))


@pytest.mark.parametrize(
    ("words", "gpu", "why"),
    [
        (["trainer.compile=all"], {}, "choose auto, layers or off"),
        (["trainer.padded_lengths=0"], {}, "give at least 1, or null"),
        (["trainer.padded_lengths=null"], {}, "add trainer.padded_lengths=4"),
        (["adapter=dora"], {}, "adapter=dora .*use trainer.compile=off, or adapter=lora"),
        (["adapter=lokr", "+adapter.module_dropout=0.1"], {}, "module_dropout=0.1.*use trainer.compile=off"),
        (["adapter=prefix"], {}, "use trainer.compile=off"),
        (["adapter=none"], {}, "use trainer.compile=off"),
        (["quant=gptq", "quant.group_size=64"], {}, "quant=gptq .*use trainer.compile=off, or quant=nf4"),
        (["trainer.compile=layers", "memory.checkpointing=full", "memory.offload=true"], CARD, "memory.offload=false"),
        (["dtype=float32"], CARD | {"compute_capability": "6.1"}, "7.0: use trainer.compile=off"),
    ],
)
def test_what_cannot_be_compiled_is_refused(resolved, words, gpu, why):
    with pytest.raises(Refusal, match=why) as refused:
        resolve.check("train", resolved([*FAST, *words], **gpu))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("missing", ["compiler", "triton"])
def test_what_compiles_has_to_be_there(resolved, monkeypatch, missing):
    config = resolved(FAST, **(CARD if missing == "triton" else {}))
    monkeypatch.setattr("shutil.which", lambda name: None)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "triton" else find(name))
    with pytest.raises(Refusal, match=r"Triton" if missing == "triton" else r"C\+\+ compiler"):
        resolve.check("train", config)
    config["trainer"]["compile"] = regional.OFF
    resolve.check("train", config)


@pytest.mark.parametrize("words", [["trainer.compile=off"], ["trainer.compile=off", "adapter=dora"], []])
def test_off_is_one_override_away(resolved, words):
    config = resolved([*FAST, *words])
    resolve.check("train", config)
    assert fast.is_compiled(config) == (not words)
    assert fast.shapes(config) == Shapes(rows=1, longest=400, lengths=4)
    assert set(fast.lightning_options(config["trainer"])).isdisjoint(fast.OWN_KEYS)


def test_the_default_compiles_nothing(resolved):
    config = resolved([])
    assert not fast.is_compiled(config)
    assert fast.shapes(config) is None
    assert "fused" not in config["optimizer"]


@pytest.mark.parametrize(
    ("words", "precision", "fused"),
    [
        ([], "32-true", True),
        (["optimizer=sgd"], "bf16-mixed", True),
        (["optimizer=adamw_8bit"], "bf16-mixed", False),
        ([], "16-mixed", False),  # whose scaler would unscale after clipping
    ],
)
def test_the_fused_optimizer_is_torch_s_own_where_there_is_one(resolved, words, precision, fused):
    config = resolved([*FAST, *words])
    config["trainer"] |= {"precision": precision, "fused": True}
    config["optimizer"].pop("fused", None)
    settled = fast.settle(config)
    assert settled["optimizer"].get("fused", False) is fused
    assert "fused" not in settled["trainer"]


RUN = ["model=custom", "limit=30", "data.batch_size=4", "callbacks.accumulation.steps=2", "data.max_length=64"]
RUN += ["trainer.max_steps=6", "optimizer.lr=1e-2"]
SMALL = ["adapter=lora", "adapter.r=4"]
SAME_LENGTH = ["data=synthetic", "data.batch_size=4", "data.max_length=16", "limit=32"]


def steps(folder):
    with (folder / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        [*SMALL, "quant=nf4", "data.packing=true"],
        ["adapter=adalora", "adapter.init_r=6", "adapter.target_r=4", "memory.checkpointing=full"],
        ["adapter=lokr", "adapter.r=8", "quant=nf4", "memory.checkpointing=2", "memory.loss_tokens=32"],
        [*SMALL, "quant=nf4_nested", "data.group_by_length=true"],
    ],
    ids=["nf4_packed", "adalora_recomputed", "lokr_nf4", "nf4_nested"],
)
def test_a_fast_run_has_the_losses_of_the_default(train_here, tiny_model, tmp_path, words):
    words = [*RUN, f"model.source={tiny_model}", *words]
    train_here(words, tmp_path / "default")
    record = train_here([*words, *FAST], tmp_path / "fast")
    wanted, found = steps(tmp_path / "default"), steps(tmp_path / "fast")
    assert len(found) == 6
    for key in ("loss", "tokens", "input_tokens"):
        assert [s[key] for s in found] == pytest.approx([s[key] for s in wanted], rel=1e-5), key
    assert [s["gradient_norm"] for s in found] == pytest.approx([s["gradient_norm"] for s in wanted], rel=1e-3)
    assert record.counts["graph_breaks"] == 0
    assert 1 <= record.counts["compiled_graphs"] <= 4 * (regional.GRAPHS_PER_SHAPE + 1)
    assert 0 < record.readings["model_flop_utilisation"].value < 1
    assert record.readings["time_to_first_step"].value > record.readings["load_time"].value
    saved = load_file(tmp_path / "fast" / "adapter" / "adapter_model.safetensors")
    assert not any("_orig_mod" in name for name in saved)


@pytest.mark.slow
def test_dropout_draws_the_same_masks_and_a_run_resumes_exactly(train_here, tiny_model, tmp_path):
    """Where shapes are the same; padding draws further numbers, and inductor has a generator of its own on GPUs."""
    words = [*RUN, *SMALL, f"model.source={tiny_model}", "adapter.lora_dropout=0.2", *SAME_LENGTH]
    words += ["callbacks.checkpoints.every_n_steps=3", "callbacks.checkpoints.keep=2"]
    train_here(words, tmp_path / "default")
    record = train_here([*words, *FAST], tmp_path / "fast")
    wanted = [step["loss"] for step in steps(tmp_path / "default")]
    found = [step["loss"] for step in steps(tmp_path / "fast")]
    assert found == pytest.approx(wanted, rel=1e-5)
    store.save(record, tmp_path / "fast")
    shutil.rmtree(tmp_path / "fast" / "checkpoints" / "step_000006")
    torch._dynamo.reset()
    train_here([*words, *FAST, f"resume={tmp_path}/fast"], tmp_path / "resumed")
    assert steps(tmp_path / "resumed") == steps(tmp_path / "fast")
    saved = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("resumed", "fast")]
    resumed, straight = map(load_file, saved)
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.mark.slow
def test_inductor_s_code_has_the_same_gradients_and_is_kept_for_the_next_run(monkeypatch, tmp_path):
    from torch._dynamo.utils import counters
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(regional, "BACKEND", "inductor")
    monkeypatch.setenv("LLM_AT_HOME_CACHE", str(tmp_path))
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    ids = torch.arange(24).reshape(2, 12)

    def gradients(compiled):
        torch.manual_seed(0)
        model = with_lora(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **shape)), init_lora_weights=False).train()
        if compiled:
            regional.CompiledLayers(model, shapes=1)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    wanted = gradients(compiled=False)
    for run in range(2):
        torch._dynamo.reset()
        counters.clear()
        for name, gradient in gradients(compiled=True).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)
        hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
        assert (hits > 0) == (run == 1)
    assert any((tmp_path / "inductor").iterdir())


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(command, tmp_path):
    words = ("adapter.r=4", "limit=7", "trainer.max_steps=4", "optimizer.lr=1e-2", "rerun=true", "data.max_length=64")
    words += ("callbacks.power.idle_seconds=0", "trainer.padded_lengths=1", "trainer.compile=layers")
    one, two = tmp_path / "one", tmp_path / "two"
    plain = (*words[:-1], "callbacks.accumulation.steps=4", f"hydra.run.dir={one}")
    done = command("train.py", *plain)
    assert done.returncode == 0, done.stderr
    both = ("trainer=ddp", "callbacks.accumulation.steps=2", f"hydra.run.dir={two}")
    done = command("train.py", *words, *both, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr + (two / "job.log").read_text()
    for key in ("loss", "tokens", "gradient_norm"):
        assert [s[key] for s in steps(two)] == pytest.approx([s[key] for s in steps(one)], rel=1e-4), key
    record = store.load(two)
    assert record.counts["graph_breaks"] == 0
    assert record.counts["compiled_graphs"] == 3  # the first layer, the others, the loss
