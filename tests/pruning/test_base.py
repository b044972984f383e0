"""A pruned base: what is pruned and what stays, what it may be combined with, and what its record says."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm_at_home.adapters.attach import merged, prepare_for_training
from llm_at_home.data.texts import load_texts
from llm_at_home.errors import Refusal
from llm_at_home.models.embedded import ensure_converted
from llm_at_home.pruning import base, checkpoint, walk
from llm_at_home.pruning.naming import prune_words
from llm_at_home.quantization.base import describe_kernel
from llm_at_home.quantization.layers import linear_layers
from llm_at_home.records import hashing, store
from llm_at_home.records.schema import Record
from llm_at_home.tasks import evaluate, resolve

from .conftest import FEW, LAYERS, resolved

IDS = torch.arange(100, 140).reshape(2, 20)


def weights(model):
    return {name: layer.weight.detach().float() for name, layer in linear_layers(model)}


@pytest.mark.parametrize(
    ("words", "share"),
    [
        (["prune=magnitude", "prune.sparsity=0.25"], 0.25),
        (["prune=wanda", "prune.sparsity=0.5", *FEW], 0.5),
        (["prune=sparsegpt", "prune.pattern=2:4", *FEW], 0.5),
    ],
)
def test_every_linear_layer_of_the_decoder_is_pruned_and_nothing_else(small_model, words, share):
    config = resolved("infer", small_model, *words)
    assert base.needs_making(config)
    model = base.load_base(config)
    assert not base.needs_making(config)
    dense = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    found = weights(model)
    assert len(found) == LAYERS
    for name, weight in found.items():
        assert float((weight == 0).float().mean()) == pytest.approx(share, abs=1e-4), name
        if config["prune"]["pattern"] == "2:4":
            assert ((weight.reshape(-1, 4) == 0).sum(-1) == 2).all(), name
    for name, parameter in dense.named_parameters():
        if "proj" not in name:
            assert torch.equal(model.get_parameter(name), parameter), name
    reading = base.readings(config)["sparsity"]
    assert (reading.value, reading.n) == (pytest.approx(share, abs=1e-4), LAYERS)
    said = base.provenance(config)["pruning"]
    assert said["sparsity"].keys() == found.keys()
    assert (said["calibration"] is None) == (config["prune"]["name"] == "magnitude")


def test_a_layer_is_pruned_by_what_the_pruned_layers_before_it_put_out(small_model):
    """Against the plain way: the whole model runs anew for each layer, and hooks see what comes in."""
    from llm_at_home.models.loading import load_tokenizer
    from llm_at_home.pruning import sparsegpt
    from llm_at_home.pruning.pattern import Pattern
    from llm_at_home.quantization.calibration import calibration_texts

    config = resolved("infer", small_model, "prune=sparsegpt", *FEW)
    options = config["prune"]
    tokenizer = load_tokenizer(config["model"])
    rows = [tokenizer(text)["input_ids"][:64] for text in calibration_texts(options["calibration"])]
    plain = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32).eval()
    with torch.no_grad():
        for layer in plain.model.layers:
            linear = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
            seen = {m: sparsegpt.Statistics(m.in_features, "cpu") for m in linear}
            hooks = [m.register_forward_pre_hook(lambda m, args, s=s: s.add(args[0][0])) for m, s in seen.items()]
            for row in rows:
                plain(input_ids=torch.tensor([row]))
            for hook in hooks:
                hook.remove()
            for m in linear:
                m.weight.copy_(sparsegpt.prune(m.weight, seen[m], Pattern.of(options), options))
    expected = weights(plain)
    for name, weight in weights(base.load_base(config)).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("quant", ["nf4", "nf4_nested", "fp4", "int8", "int8_torchao", "rtn"])
def test_quantizing_a_pruned_base_keeps_its_zeros(small_model, quant):
    words = ["quant.group_size=32"] if quant == "rtn" else []
    config = resolved("infer", small_model, f"quant={quant}", "prune=magnitude", "prune.pattern=2:4", *words)
    model = base.load_base(config)
    zeros = {name: weight == 0 for name, weight in weights(base.load_base({**config, "quant": DENSE})).items()}
    seen = {}
    for name, layer in linear_layers(model):
        with torch.no_grad():
            seen[name] = layer(torch.eye(layer.in_features)).T
    assert set(describe_kernel(model)["layers"].values()) == {LAYERS}
    for name, weight in seen.items():
        assert float(weight[zeros[name]].abs().max()) == 0, name
        assert float(weight.abs().max()) > 0, name


DENSE = {"name": "none", "method": "dense", "bits": None}


def test_training_an_adapter_leaves_the_zeros_of_its_base(small_model):
    config = resolved("train", small_model, "prune=wanda", *FEW, "adapter.r=4")
    model = prepare_for_training(base.load_base(config), config["adapter"])
    before = {name: weight.clone() for name, weight in weights(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1, "it trains"
    assert len(before) == LAYERS
    for name, weight in weights(model).items():
        assert torch.equal(weight, before[name]), name
        assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=1e-4), name
    assert all(share < 0.01 for share in checkpoint.sparsity_by_layer(merged(model)).values()), "merging fills them"


def test_an_adapter_is_merged_into_the_base_that_it_was_trained_on_or_not_at_all(small_model, tmp_path):
    """What a training run leaves, and the merging of it; the command itself is among the slow tests."""
    trained = resolved("train", small_model, "prune=wanda", *FEW)
    store.save(Record("train", config=trained), tmp_path / "run")
    (tmp_path / "run" / "adapter").mkdir()
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")
    words = [f"adapter_path={tmp_path}/run", f"out={tmp_path}/out"]
    for other in (["prune=none"], ["prune=wanda", "prune.sparsity=0.25"], ["prune=magnitude"]):
        with pytest.raises(Refusal, match="trained on prune=wanda 50 %: merge with the prune= of its training"):
            resolved("merge", small_model, *words, *other)
    assert resolved("merge", small_model, *words, "prune=wanda")


@pytest.mark.slow
def test_a_pruned_base_is_made_trained_on_and_merged_into_by_the_commands(command, small_model, tmp_path):
    base_words = ["model=custom", f"model.source={small_model}", "prune=wanda", "prune.sparsity=0.6", *FEW]
    run = tmp_path / "run"
    words = ["adapter.r=4", "trainer.max_steps=2", "callbacks.accumulation.steps=1", "optimizer.lr=1e-2", "limit=8"]
    done = command("train.py", *base_words, *words, f"hydra.run.dir={run}", model=False)
    assert done.returncode == 0, done.stderr
    record, making = store.load(run), store.load(run / "making")
    assert (making.task, making.status) == ("prune", "ok")
    assert any("kept in" in note for note in making.notes)
    for one in (record, making):
        assert one.readings["sparsity"].value == pytest.approx(0.6, abs=0.01)
        assert one.readings["pruning_time"].value > 0
        assert one.provenance["pruning"]["calibration"]["texts"] == 4
        assert len(one.provenance["pruning"]["sparsity"]) == LAYERS
    words = [f"adapter_path={run}", f"out={tmp_path}/out", f"hydra.run.dir={tmp_path}/merge"]
    done = command("src/llm_at_home/tasks/merge.py", *base_words, *words, model=False)
    assert done.returncode == 0, done.stderr
    record = store.load(tmp_path / "merge")
    assert record.readings["sparsity"].value == pytest.approx(0.6, abs=0.01)
    assert record.readings["sparsity_merged"].value < 0.01
    assert any("dense again" in note for note in record.notes)
    words = ["task=fidelity", "limit=2", "fidelity.answer_tokens=0", f"hydra.run.dir={tmp_path}/fidelity"]
    done = command("evaluate.py", *base_words, *words, model=False)
    assert done.returncode == 0, done.stderr
    assert store.load(tmp_path / "fidelity").readings["sparsity"].value == pytest.approx(0.6, abs=0.01)


def test_fidelity_is_against_the_model_before_it_was_pruned(small_model, tmp_path):
    words = ["task=fidelity", "limit=2", "fidelity.answer_tokens=0", "prune=magnitude", "prune.sparsity=0.9"]
    config = resolved("evaluate", small_model, *words)
    record = Record("evaluate", config=config)
    evaluate.run(config, tmp_path, record, None)
    assert record.quality["kl_divergence_mean"].value > 1e-5, "random weights say little, and float noise is below"
    assert 0 < record.quality["top1_agreement"].value < 1
    assert base.readings(config)["sparsity"].value == pytest.approx(0.9, abs=1e-3)


def conversations(path, text):
    """A file of twenty conversations that all end with one text."""
    asked = [{"role": "user", "content": f"Question {i}"} for i in range(20)]
    rows = [{"messages": [question, {"role": "assistant", "content": text}]} for question in asked]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pruning_and_its_calibration_text_decide_the_config_hash(small_model, tmp_path):
    def digest(*words):
        config = resolved("infer", small_model, *words)
        return hashing.config_hash(config, resolve.ingredients("infer", config))

    def own(text):
        texts = conversations(tmp_path / "own.jsonl", text)
        return digest("prune=wanda", "prune.calibration.source=jsonl", f"prune.calibration.path={texts}")

    found = [
        digest(),
        digest("prune=magnitude"),
        digest("prune=magnitude", "prune.sparsity=0.25"),
        digest("prune=wanda"),
    ]
    found += [digest("prune=wanda", *FEW), own("A first text to calibrate on"), own("And another one, of other words")]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("command", "words", "hint"),
    [
        ("infer", ["prune=magnitude", "prune.sparsity=1"], "between 0 and 1"),
        ("infer", ["prune=magnitude", "prune.pattern=4:2"], "n below m, such as 2:4"),
        ("infer", ["prune=magnitude", "prune.pattern=3:7"], "does not divide"),
        ("infer", ["prune=magnitude", "prune.pattern=2:4", "prune.sparsity=0.25"], "leave out one of the two"),
        ("infer", ["prune=wanda", "quant=gptq"], "model.source=FOLDER"),
        ("infer", ["prune=wanda", "quant=gguf"], "model.source=FOLDER"),
        ("infer", ["prune=wanda", "quant=int4_torchao"], "model.source=FOLDER"),
        ("infer", ["prune=wanda", "model.weights=random"], "use prune=magnitude"),
        ("infer", ["prune=magnitude", "model.weights=random", "quant=nf4"], "use quant=none"),
        ("infer", ["prune=wanda", "prune.calibration.max_length=4"], "at least 16"),
        ("infer", ["prune=wanda", "prune.calibration.limit=0"], "at least 1"),
        ("infer", ["prune=sparsegpt", "prune.pattern=2:4", "prune.block_size=6"], "multiple of 4"),
        ("infer", ["prune=sparsegpt", "prune.damping=-1"], "negative"),
        ("infer", ["prune=magnitude", "prune.kernel=sparse"], "choose dense or semi_structured"),
        ("infer", ["prune=magnitude", "prune.kernel=semi_structured"], "prune.pattern=2:4"),
        ("infer", ["prune=magnitude", "prune.pattern=2:4", "prune.kernel=semi_structured"], "use gpu=cuda"),
        ("train", ["prune=wanda", "adapter=full"], "adapter=lora"),
        ("train", ["prune=wanda", "adapter=lora_pissa"], "adapter=lora"),
        ("train", ["prune=wanda", "adapter=lora_loftq", "quant=nf4"], "adapter=lora"),
        ("train", ["prune=magnitude", "prune.pattern=2:4", "prune.kernel=semi_structured"], "passes no gradients"),
        ("prune", ["prune=none"], "prunes nothing"),
        ("prune", ["prune=magnitude", "model.weights=random"], "model.weights=pretrained"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_loads(small_model, command, words, hint):
    with pytest.raises(Refusal, match=hint):
        resolved(command, small_model, *words)


def test_calibration_on_text_that_is_measured_on_is_refused(small_model, tmp_path):
    path = conversations(tmp_path / "own.jsonl", load_texts("held_out")[0])
    words = ["prune=wanda", "prune.calibration.source=jsonl", f"prune.calibration.path={path}"]
    with pytest.raises(Refusal, match=r"use prune\.calibration\.source=texts"):
        resolved("evaluate", small_model, "task=fidelity", *words)
    assert resolved("infer", small_model, *words), "inference measures no such text"


def test_a_gpu_s_kernel_is_refused_where_the_card_or_the_dtype_lacks_it(small_model):
    config = resolved("infer", small_model, "prune=magnitude", "prune.pattern=2:4")
    config["prune"]["kernel"] = "semi_structured"
    for dtype, chip, hint in (
        ("float32", "9.0", "16 bits"),
        ("float16", "7.5", r"needs 8\.0: use prune\.kernel=dense"),
    ):
        card = {"name": "card", "card": "card", "device": "cuda", "compute_capability": chip}
        with pytest.raises(Refusal, match=hint):
            base.check({**config, "dtype": dtype, "gpu": card})
    card["compute_capability"] = "8.0"
    base.check({**config, "dtype": "float16", "gpu": card})


def test_other_architectures_are_refused(small_model, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "other")
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**shape, "model_type": "mixtral"}))
    with pytest.raises(Refusal, match="layers of mixtral are not known"):
        resolved("infer", folder, "prune=magnitude")
    config = resolved("infer", small_model, "prune=magnitude")
    config["model"]["source"] = str(folder)  # as a model of the hub, whose kind is known only once it is there
    with pytest.raises(Refusal, match="layers of mixtral are not known"):
        base.load_base(config)


def test_layers_with_masks_of_their_own_are_refused():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8}
    options = {"name": "wanda", "method": "wanda", "pattern": "unstructured", "sparsity": 0.5}
    model = Gemma2ForCausalLM(Gemma2Config(**shape)).eval()
    with pytest.raises(Refusal, match="not called alike"):
        walk.prune_layers(model, [list(range(1, 30))], options, "cpu")
    walk.prune_layers(model, [list(range(1, 6))], options, "cpu")  # within the window all see the same
    assert all(float((w == 0).float().mean()) == 0.5 for w in weights(model).values())
    walk.prune_layers(model, [], {**options, "method": "magnitude", "sparsity": 0.75}, "cpu")
    assert all(float((w == 0).float().mean()) == 0.75 for w in weights(model).values())


def test_weights_that_are_no_numbers_stop_the_making_and_leave_nothing(small_model, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = resolved("infer", folder, "prune=magnitude")
    with pytest.raises(RuntimeError, match=r"layer 1\.mlp\.up_proj are not finite"):
        base.load_base(config)
    assert not checkpoint.is_there(config)
    for words in (["prune=wanda", *FEW], ["prune=sparsegpt", *FEW]):
        with pytest.raises(RuntimeError, match=r"not finite"):
            base.load_base(resolved("infer", folder, *words))


def test_the_embedded_model_has_next_to_no_zeros_of_its_own():
    """Its weights lay on 4-bit grids, and such a grid need not have a zero: docs/pruning.md says what follows."""
    tensors = load_file(ensure_converted() / "model.safetensors")
    linear = [tensor for name, tensor in tensors.items() if "proj" in name]
    assert sum(tensor.numel() for tensor in linear) == 106_168_320
    assert sum(int((tensor == 0).sum()) for tensor in linear) == 33_483


def test_random_weights_are_pruned_while_they_are_made(small_model):
    model = base.load_base(
        resolved("infer", small_model, "prune=magnitude", "prune.pattern=2:4", "model.weights=random")
    )
    found = weights(model)
    assert len(found) == LAYERS
    assert all(((w.reshape(-1, 4) == 0).sum(-1) == 2).all() for w in found.values())
    assert float((model.get_input_embeddings().weight == 0).float().mean()) < 0.01
    assert describe_kernel(model)["linear"] == "Linear"
    with torch.no_grad():
        assert model(input_ids=IDS).logits.isfinite().all()


def test_a_pruning_is_named_by_what_tells_it_from_others(small_model):
    assert prune_words(resolved("infer", small_model)["prune"]) == []
    assert prune_words(resolved("infer", small_model, "prune=wanda")["prune"]) == ["wanda 50 %"]
    assert prune_words(resolved("infer", small_model, "prune=sparsegpt", "prune.pattern=4:8")["prune"]) == [
        "sparsegpt 4:8"
    ]
