"""The three commands as a user runs them, on a tiny real model."""

from __future__ import annotations

import json

import pytest

TRAIN = ("limit=16", "adapter.r=4", "trainer.max_steps=3", "data.batch_size=2", "callbacks.accumulation.steps=2")
INFER = ("limit=2", "engine.max_new_tokens=6")


def record(folder):
    return json.loads((folder / "record.json").read_text())


def test_train_then_infer_then_evaluate(tmp_path, command):
    trained, answered, scored = tmp_path / "trained", tmp_path / "answered", tmp_path / "scored"

    done = command("train.py", *TRAIN, f"hydra.run.dir={trained}")
    assert done.returncode == 0, done.stderr
    found = record(trained)
    assert found["status"] == "ok"
    assert found["counts"]["optimizer_steps"] == 3
    assert found["kernel"]["linear"] == "Linear"
    assert found["config"]["trainer"]["precision"] == "32-true"
    assert found["readings"]["steps_per_second"]["value"] > 0
    assert found["readings"]["energy_gross"]["value"] is None or found["readings"]["energy_gross"]["method"] == "rapl"
    assert found["quality"]["loss_last"]["unit"] == "nats/token"
    assert (trained / "config.yaml").is_file()
    # PEFT would import gptqmodel, for seconds, to ask whether a layer is one of its; that says so in the log.
    assert "gptqmodel" not in (trained / "job.log").read_text()

    done = command("infer.py", *INFER, f"adapter_path={trained}", f"hydra.run.dir={answered}")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (answered / "answers.jsonl").read_text().splitlines()]
    assert [len(row["choices"][0]["turns"]) for row in rows] == [2, 2]
    assert {"question_id", "answer_id", "model_id", "choices", "tstamp"} <= set(rows[0])
    found = record(answered)
    assert found["counts"]["generated_tokens"] == sum(sum(row["generated_tokens"]) for row in rows)
    assert found["readings"]["decode_tokens_per_second"]["value"] > 0

    done = command(
        "evaluate.py",
        "task=text",
        "limit=6",
        "text.max_new_tokens=4",
        f"adapter_path={trained}",
        f"hydra.run.dir={scored}",
    )
    assert done.returncode == 0, done.stderr
    found = record(scored)
    assert found["subject"]["config_hash"] == record(trained)["config_hash"]
    assert 0 <= found["quality"]["exact_match"]["value"] <= 1
    assert found["quality"]["perplexity_home_bench"]["value"] > 1


def test_the_adapter_is_peft_s_own(tmp_path, command, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "run"
    assert command("train.py", *TRAIN, f"hydra.run.dir={folder}").returncode == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder / "adapter")
    assert model.peft_config["default"].r == 4
    assert any(float(p.abs().sum()) > 0 for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(("adapter", "saved"), [("full", "model"), ("none", None)])
def test_the_other_ways_of_training(tmp_path, command, adapter, saved):
    folder = tmp_path / adapter
    words = [word for word in TRAIN if not word.startswith("adapter.")]
    done = command("train.py", f"adapter={adapter}", *words, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    found = record(folder)
    assert found["counts"]["optimizer_steps"] == 3
    assert (found["readings"]["trainable_parameters"]["value"] > 0) == (adapter == "full")
    if saved:
        assert (folder / saved / "model.safetensors").is_file()
    else:
        assert not (folder / "adapter").exists()


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_quantized_base_answers_and_names_its_kernel(tmp_path, command, quant):
    folder = tmp_path / quant
    done = command("infer.py", *INFER, f"quant={quant}", f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    kernel = record(folder)["kernel"]
    assert kernel["linear"] == {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quant]
    assert kernel["layers"] == {kernel["linear"]: 14}


def test_training_on_nf4(tmp_path, command):
    folder = tmp_path / "nf4"
    done = command("train.py", *TRAIN, "quant=nf4", f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    assert record(folder)["kernel"]["layers"] == {"Linear4bit": 14}


def test_random_weights_of_an_architecture_need_no_tokenizer(tmp_path, command):
    shape = (
        "model=llama2_7b", "model.weights=random", "model.architecture.num_hidden_layers=1",
        "model.architecture.hidden_size=64", "model.architecture.intermediate_size=64",
        "model.architecture.num_attention_heads=4", "model.architecture.num_key_value_heads=4",
    )  # fmt: skip
    synthetic = ("questions=synthetic", "questions.prompt_tokens=16", "engine.max_new_tokens=5", "limit=2")
    folder = tmp_path / "random"
    done = command("infer.py", *shape, *synthetic, f"hydra.run.dir={folder}", model=False)
    assert done.returncode == 0, done.stderr
    assert record(folder)["counts"]["generated_tokens"] == 10
    trained = tmp_path / "trained"
    words = ("data=synthetic", "data.max_length=16", "trainer.max_steps=2", "callbacks.accumulation.steps=1")
    done = command("train.py", *shape, *words, f"hydra.run.dir={trained}", model=False)
    assert done.returncode == 0, done.stderr
    judged = command("evaluate.py", f"answers={folder}", model=False)
    assert judged.returncode == 2
    assert "random weights" in judged.stderr


def test_chat_is_a_conversation_on_the_terminal(command):
    done = command("infer.py", "mode=chat", "engine.max_new_tokens=4", stdin="hello\n/reset\n/exit\n")
    assert done.returncode == 0, done.stderr
    assert "(a new conversation)" in done.stdout
    assert done.stdout.count("> ") == 3


def test_the_same_seed_gives_the_same_tokens_and_losses(tmp_path, command):
    for i in range(2):
        sampled = ("engine.temperature=1.0", "rerun=true")
        assert command("infer.py", *INFER, *sampled, f"hydra.run.dir={tmp_path}/i{i}").returncode == 0
        assert command("train.py", *TRAIN, "rerun=true", f"hydra.run.dir={tmp_path}/t{i}").returncode == 0
    answers = [
        [json.loads(line)["choices"] for line in (tmp_path / f"i{i}" / "answers.jsonl").read_text().splitlines()]
        for i in range(2)
    ]
    assert answers[0] == answers[1]
    assert (tmp_path / "t0" / "metrics.csv").read_text() == (tmp_path / "t1" / "metrics.csv").read_text()
