"""make merge: the merged model says what the adapter on its base says, and what cannot be merged is refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_at_home.adapters.attach import adapter_folder, add_saved, attach_saved, merged, prepare_for_training
from llm_at_home.errors import Refusal
from llm_at_home.quantization import gguf_write
from llm_at_home.quantization.gguf_file import GGUFFile
from llm_at_home.tasks.checks.making import check_merge

MODULE = "src/llm_at_home/tasks/merge.py"
IDS = torch.arange(50, 80).reshape(1, 30)
LORA = {"name": "lora", "trains": "adapter", "_target_": "peft.LoraConfig", "task_type": "CAUSAL_LM"}
LORA |= {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}  # off its start: an update to merge
PROMPT = {"name": "prompt", "trains": "adapter", "_target_": "peft.PromptTuningConfig", "task_type": "CAUSAL_LM"}
PROMPT |= {"num_virtual_tokens": 4}


@pytest.fixture
def saved(tiny_model, tmp_path):
    def save(adapter, name="adapter", seed=0):
        torch.manual_seed(seed)
        model = prepare_for_training(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), adapter)
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            return tmp_path / name, model.eval()(IDS).logits

    return save


def test_the_merged_model_is_the_adapter_on_its_base(command, saved, tmp_path):
    folder, logits = saved(LORA)
    out = tmp_path / "out"
    words = (f"adapter_path={folder}", f"out={out}", "gguf=F16", f"hydra.run.dir={tmp_path}/run")
    done = command(MODULE, *words)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["quality"]["logit_difference"]["value"] < 1e-5
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    assert (out / "model.gguf").read_bytes()[:4] == b"GGUF"
    assert (out / "Modelfile").read_text().splitlines()[1] == "FROM ./model.gguf"
    assert (out / "tokenizer.json").is_file()
    again = command(MODULE, *words)
    assert again.returncode == 2
    assert "exists" in again.stderr
    assert [path.name for path in tmp_path.glob(".out*")] == []


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["quant=nf4"], "merge with quant=none"),
        (["gguf=Q4_K_M"], "choose one of F32"),
        (["adapter_path=/no"], "holds no"),
    ],
)
def test_what_cannot_be_merged_is_refused(command, saved, tmp_path, words, hint):
    folder, _ = saved(LORA)
    done = command(MODULE, f"adapter_path={folder}", f"out={tmp_path}/out", *words)
    assert done.returncode == 2
    assert hint in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_an_update_of_one_end_of_a_tied_model_leaves_the_other_as_it_is(saved, tiny_model, tmp_path, end):
    folder, logits = saved(LORA | {"target_modules": ["q_proj", end]})
    model = merged(attach_saved(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), folder))
    model.save_pretrained(tmp_path / "out")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    gguf_write.write(tmp_path / "out.gguf", read, AutoTokenizer.from_pretrained(tiny_model), "F32", "tiny")
    with torch.no_grad():
        torch.testing.assert_close(read(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    file = GGUFFile(tmp_path / "out.gguf")
    stored = {tensor.name: tensor for tensor in file.tensors}
    for name, weight in (("output.weight", read.lm_head.weight), ("token_embd.weight", read.model.embed_tokens.weight)):
        assert (torch.from_numpy(file.dequantized(stored[name])) == weight).all()


def test_a_model_that_the_writer_does_not_know_is_refused_before_it_is_loaded(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    model = {"source": str(tmp_path), "weights": "pretrained", "architecture": None}
    asked = {"model": model, "adapter_path": str(tmp_path), "out": f"{tmp_path}/out", "gguf": None}
    asked |= {"quant": {"name": "none", "method": "dense"}, "prune": {"name": "none"}}
    check_merge(asked)
    with pytest.raises(Refusal, match="this one is qwen2"):
        check_merge(asked | {"gguf": "Q8_0"})
    with pytest.raises(Refusal, match="names no folder"):
        check_merge(asked | {"out": None})


def test_a_prompt_is_not_merged(saved, tiny_model):
    folder, _ = saved(PROMPT)
    model = attach_saved(AutoModelForCausalLM.from_pretrained(tiny_model), folder)
    with pytest.raises(Refusal, match="no place in the weights"):
        merged(model)


def test_adapters_are_switched_at_run_time(saved, tiny_model):
    (one, first), (two, second) = saved(LORA, "one", 1), saved(LORA, "two", 2)
    model = attach_saved(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), one)
    add_saved(model, two, "two")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, first)
        model.set_adapter("two")
        torch.testing.assert_close(model(IDS).logits, second)
    prompt, _ = saved(PROMPT, "prompt")
    with pytest.raises(Refusal, match="does not fit here"):
        add_saved(model, prompt, "prompt")


def test_a_hub_id_without_a_hub_is_refused_in_a_line():
    with pytest.raises(Refusal, match="is no folder, and the hub does not give it") as refusal:
        adapter_folder("somebody/some-adapter")
    assert "\n" not in str(refusal.value)
