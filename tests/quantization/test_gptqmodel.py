"""GPTQ and AWQ checkpoints: made once, read as published, and computing what their codes say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_at_home.errors import Refusal
from llm_at_home.quantization import base, gptq_checkpoint, gptqmodel
from llm_at_home.quantization.size import size_readings
from llm_at_home.records import store

from .conftest import lora_gradients, resolved

FEW = ["quant.group_size=32", "quant.calibration.limit=4", "quant.calibration.max_length=64"]
IDS = torch.arange(100, 140).reshape(2, 20)


@pytest.fixture(scope="module", autouse=True)
def uncompiled():
    """GPTQModel compiles the reading of weights for each shape, which takes longer than these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def dense(wide_model):
    return logits(base.load_base(resolved("infer", wide_model)))


def test_gptq_is_made_once_with_a_named_kernel_and_no_plain_layer(wide_model, own_cache, dense, capfd):
    config = resolved("infer", wide_model, "quant=gptq", *FEW)
    assert config["dtype"] == "bfloat16", "the kernels take no float32"
    model = base.load_base(config)
    assert base.describe_kernel(model)["layers"] == {"TorchAtenLinear": 14}
    assert base.describe_kernel(model)["backend"].startswith("gptqmodel cpu")
    assert relative_error(logits(model), dense) < 0.2
    captured = capfd.readouterr()
    assert captured.out == "", "what GPTQModel prints goes to the log"
    assert "quantized layer 2 of 2" in captured.err

    (folder,) = (path for path in (own_cache / "quantized").iterdir() if path.is_dir())
    before = (folder / "model.safetensors").stat().st_mtime_ns
    again = base.load_base(config)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert torch.equal(logits(again), logits(model))

    readings = size_readings(model)
    stored = load_file(folder / "model.safetensors")
    linear = sum(t.numel() * t.element_size() for name, t in stored.items() if "proj." in name)
    weights = sum(t.numel() * 8 for name, t in stored.items() if name.endswith("qweight"))
    assert readings["bits_per_weight_on_disk"].value == pytest.approx(8 * linear / weights)
    assert 4.5 < readings["bits_per_weight_on_disk"].value < 5.5
    assert readings["make_time"].value > 0


@pytest.mark.slow
def test_fewer_bits_lose_more(wide_model, own_cache, dense):
    errors = [
        relative_error(
            logits(base.load_base(resolved("infer", wide_model, "quant=gptq", f"quant.bits={b}", *FEW))), dense
        )
        for b in (8, 4, 3, 2)
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.03


def test_mixed_bits_meet_their_target_on_disk(wide_model, own_cache):
    config = resolved("infer", wide_model, "quant=gptq_mixed", "quant.target_bits=4.2", *FEW)
    model = base.load_base(config)
    assert 3.5 < size_readings(model)["bits_per_weight_on_disk"].value <= 4.2
    widths = {layer.bits for layer in model.modules() if hasattr(layer, "qweight")}
    assert len(widths) > 1


def test_an_interruption_leaves_no_half_checkpoint(wide_model, own_cache, monkeypatch):
    def interrupted(self, layer_idx, submodule_finalized):
        raise KeyboardInterrupt

    monkeypatch.setattr(gptq_checkpoint._Progress, "layer_complete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        base.load_base(resolved("infer", wide_model, "quant=gptq", *FEW))
    assert not [path for path in (own_cache / "quantized").iterdir() if path.is_dir()]


@pytest.mark.slow
def test_awq_is_made_and_read(wide_model, own_cache, dense):
    model = base.load_base(resolved("infer", wide_model, "quant=awq", *FEW))
    assert base.describe_kernel(model)["layers"] == {"TorchAtenAwqLinear": 14}
    assert relative_error(logits(model), dense) < 0.2


@pytest.mark.slow
def test_awq_made_on_a_cpu_loses_less_than_plain_rounding(own_cache, tmp_path):
    """It did not while layers of one input shared a tensor that was scaled once for each of them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llm_at_home.models.embedded import ensure_converted

    whole = ensure_converted()
    AutoModelForCausalLM.from_pretrained(whole, num_hidden_layers=2).save_pretrained(tmp_path / "two_layers")
    tokenizer = AutoTokenizer.from_pretrained(whole)
    tokenizer.save_pretrained(tmp_path / "two_layers")
    text = (Path(__file__).resolve().parents[2] / "docs" / "fidelity.md").read_text()
    ids = torch.tensor([tokenizer(text)["input_ids"][:1000]])

    def states(*words):
        with torch.no_grad():
            return (
                base.load_base(resolved("infer", tmp_path / "two_layers", *words)).model(ids).last_hidden_state.float()
            )

    plain = states()
    rounded = relative_error(states("quant=rtn", "quant.bits=4", "quant.group_size=64"), plain)
    assert relative_error(states("quant=awq", "quant.kernel=awq_torch"), plain) < 0.95 * rounded


# Two independent writers of the published formats, from plain rounding, so that what loads can be computed by hand.


def rounded(weight, group, symmetric):
    """4-bit codes (inputs, outputs), scales and zero points (groups, outputs), and the weight that they stand for."""
    columns = weight.float().T.reshape(-1, group, weight.shape[0])
    low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / 15).clamp(min=1e-8).half()
    zero = (-low / scale.float()).round().clamp(1, 15) if not symmetric else torch.full_like(low, 8)
    codes = (columns / scale.float()[:, None] + zero[:, None]).round().clamp(0, 15)
    weight = ((codes - zero[:, None]) * scale.float()[:, None]).reshape(weight.shape[1], -1).T
    return codes.reshape(weight.shape[1], -1).to(torch.int64), scale, zero.to(torch.int64), weight


def packed(codes, order, dim):
    """Eight 4-bit codes to an int32 along ``dim``, the one that stands at ``order[i]`` in its i-th four bits."""
    codes = codes.movedim(dim, -1)
    groups = codes.reshape(*codes.shape[:-1], -1, 8)
    words = sum(groups[..., place] << (4 * i) for i, place in enumerate(order))
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return words.movedim(-1, dim).contiguous()


def autogptq(codes, scale, zero, group):
    plain = range(8)
    return {
        "qweight": packed(codes, plain, 0),
        "qzeros": packed((zero - 1) & 15, plain, 1),  # version 1 of the format stores the zero point less one
        "scales": scale,
        "g_idx": (torch.arange(codes.shape[0]) // group).to(torch.int32),
    }


def autoawq(codes, scale, zero, group):
    interleaved = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": packed(codes, interleaved, 1), "qzeros": packed(zero, interleaved, 1), "scales": scale}


AUTOGPTQ = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": True}
AUTOGPTQ |= {
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "model",
    "quant_method": "gptq",
}
AUTOAWQ = {"bits": 4, "group_size": 32, "quant_method": "awq", "version": "gemm", "zero_point": True}
AUTOAWQ |= {"modules_to_not_convert": None}


def published(wide_model, folder, pack, quantization_config):
    """A checkpoint as AutoGPTQ or AutoAWQ wrote it, and the same weights dense."""
    shutil.copytree(wide_model, folder)
    tensors = load_file(folder / "model.safetensors")
    plain = dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        codes, scale, zero, weight = rounded(tensors.pop(name), 32, quantization_config.get("sym", False))
        plain[name] = weight.contiguous()
        tensors |= {
            f"{name.removesuffix('.weight')}.{key}": value for key, value in pack(codes, scale, zero, 32).items()
        }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization_config}))
    as_dense = shutil.copytree(wide_model, folder.with_name("dense"))
    save_file(plain, as_dense / "model.safetensors", {"format": "pt"})
    return folder, as_dense


@pytest.mark.parametrize(
    ("quant", "pack", "quantization_config"), [("gptq", autogptq, AUTOGPTQ), ("awq", autoawq, AUTOAWQ)]
)
@pytest.mark.parametrize("kernel", ["null", "torch"])
def test_a_published_checkpoint_computes_what_its_codes_say(
    wide_model, tmp_path, own_cache, quant, pack, quantization_config, kernel
):
    folder, as_dense = published(wide_model, tmp_path / "published", pack, quantization_config)
    named = kernel if kernel == "null" else f"{quant}_torch"
    model = base.load_base(resolved("infer", folder, f"quant={quant}", f"quant.kernel={named}"))
    assert set(base.describe_kernel(model)["layers"].values()) == {14}
    expected = logits(base.load_base(resolved("infer", as_dense)))
    assert relative_error(logits(model), expected) < 0.02, "bfloat16 against float32"
    assert not (own_cache / "quantized").exists(), "nothing was made"


def test_what_gptqmodel_cannot_read_ends_in_one_line(wide_model, tmp_path):
    folder, _ = published(wide_model, tmp_path / "published", autogptq, {**AUTOGPTQ, "sym": False})
    with pytest.raises(Refusal, match="sym=False"):
        base.load_base(resolved("infer", folder, "quant=gptq"))


def test_a_checkpoint_is_called_what_it_is(wide_model, tmp_path):
    folder, _ = published(wide_model, tmp_path / "published", autogptq, AUTOGPTQ)
    for words, hint in (
        (["quant=none"], "read it with quant=gptq"),
        (["quant=nf4"], "read it with quant=gptq"),
        (["quant=rtn"], "read it with quant=gptq"),
    ):
        with pytest.raises(Refusal, match=hint):
            resolved("infer", folder, *words)
    for words, hint in (
        (["quant=awq"], "use quant=gptq"),
        (["quant=gptq", "quant.bits=8"], r"give quant\.bits=4"),
        (["quant=gptq", "quant.group_size=64"], r"give quant\.group_size=32"),
        (["quant=gptq", "quant.sym=false"], r"give quant\.sym=true"),
    ):
        with pytest.raises(Refusal, match=hint):
            resolved("infer", folder, *words)


@pytest.mark.parametrize(
    ("quant", "pack", "quantization_config", "settings"),
    [
        (
            "gptq",
            autogptq,
            {**AUTOGPTQ, "desc_act": True},
            {"bits": 4, "group_size": 32, "sym": True, "desc_act": True},
        ),
        ("awq", autoawq, AUTOAWQ, {"bits": 4, "group_size": 32, "sym": False}),
        ("gptq_mixed", autogptq, AUTOGPTQ, {"bits": 4, "target_bits": None}),
    ],
)
def test_a_record_names_the_checkpoint_s_settings_and_not_the_defaults(
    wide_model, tmp_path, quant, pack, quantization_config, settings
):
    folder, _ = published(wide_model, tmp_path / "published", pack, quantization_config)
    config = resolved("infer", folder, f"quant={quant}")
    assert {key: config["quant"][key] for key in settings} == settings


def test_a_checkpoint_that_becomes_known_only_once_loaded_is_held_against_the_configuration(wide_model, tmp_path):
    folder, _ = published(wide_model, tmp_path / "published", autogptq, AUTOGPTQ)
    config = resolved("infer", folder, "quant=gptq")
    config["quant"]["group_size"] = 128  # as for a checkpoint of the hub at its first use
    with pytest.raises(Refusal, match=r"give quant\.group_size=32"):
        base.load_base(config)


@pytest.mark.parametrize(("quant", "bits"), [("gptq", 4), ("gptq", 3), ("awq", 4)])
def test_random_packed_weights_have_the_shape_and_spread_of_real_ones(wide_model, quant, bits):
    words = [f"quant={quant}", f"quant.bits={bits}", "model.weights=random", "quant.group_size=32"]
    model = base.load_base(resolved("infer", wide_model, *words, f"quant.kernel={quant}_torch"))
    assert set(base.describe_kernel(model)["layers"].values()) == {14}
    layer = model.model.layers[0].mlp.up_proj
    identity = torch.eye(layer.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        weight = layer(identity).float()
    assert float(weight.std()) == pytest.approx(0.02, rel=0.1)
    assert abs(float(weight.mean())) < 0.006, "codes have no middle: half a step is left"
    assert torch.isfinite(logits(model)).all()


LORA = ["adapter=lora", "adapter.r=4", "adapter.lora_alpha=8"]


@pytest.mark.parametrize(("quant", "pack", "config"), [("gptq", autogptq, AUTOGPTQ), ("awq", autoawq, AUTOAWQ)])
def test_lora_s_gradients_are_those_on_the_dequantized_copy(wide_model, tmp_path, quant, pack, config):
    folder, as_dense = published(wide_model, tmp_path / "published", pack, config)
    training = resolved("train", folder, f"quant={quant}", *LORA)
    quantized = base.load_base(training)
    assert "Torch" in base.describe_kernel(quantized)["linear"]
    plain = base.load_base({**resolved("train", as_dense, *LORA), "dtype": "bfloat16"})
    expected, found = (lora_gradients(model, training["adapter"]) for model in (plain, quantized))
    assert len(found) == 28
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 0.05, name


@pytest.mark.parametrize(
    ("command", "words", "hint"),
    [
        ("train", ["quant=gptq", "adapter=full"], "adapter=lora or quant=none"),
        ("infer", ["quant=gptq", "quant.bits=5"], "choose one of 2, 3, 4, 8"),
        ("infer", ["quant=gptq", "quant.bits=null"], "has no number of bits: give"),
        ("infer", ["quant=awq", "quant.bits=3"], "choose one of 4"),
        ("infer", ["quant=gptq", "quant.group_size=48"], "choose one of 16, 32, 64, 128"),
        ("infer", ["quant=gptq", "dtype=float32"], "not in float32"),
        ("infer", ["quant=gptq", "quant.kernel=gptq_marlin"], "needs gpu=cuda"),
        ("infer", ["quant=exl"], "use gpu=cuda"),
        ("infer", ["quant=gptq_mixed", "quant.target_bits=1.5"], "out of reach"),
        ("infer", ["quant=gptq_mixed", "model.weights=random"], "use quant=gptq"),
        ("infer", ["quant=gptq", "quant.calibration.max_length=4"], "at least 16"),
        ("quantize", ["quant=nf4"], "nothing to make"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_loads(wide_model, command, words, hint):
    with pytest.raises(Refusal, match=hint):
        resolved(command, wide_model, *words)


def test_layers_that_a_format_cannot_hold_are_refused_before_anything_loads(tiny_model, wide_model, monkeypatch):
    with pytest.raises(Refusal, match="does not divide"):
        resolved("infer", tiny_model, "quant=gptq", "quant.group_size=128")
    with pytest.raises(Refusal, match="multiples of 64, and one has 32"):
        resolved("infer", tiny_model, "quant=awq", "quant.group_size=32")
    config = resolved("infer", wide_model, "quant=none")
    config |= {"dtype": "bfloat16", "gpu": {"name": "h100", "device": "cuda", "compute_capability": "9.0"}}
    config["quant"] = {"name": "exl", "algorithm": "exl3", "bits": 4, "kernel": None, "calibration": {}}
    monkeypatch.setenv("CUDA_HOME", "/usr/local/cuda")
    with pytest.raises(Refusal, match="multiples of 128, and one has 64"):
        gptqmodel.check(config)


@pytest.mark.slow
def test_a_job_whose_checkpoint_cannot_be_made_has_a_record_that_says_so(command, tmp_path, wide_model, own_cache):
    words = ["model=custom", f"model.source={wide_model}", "quant=gptq", *FEW, "timeout_s=3", "grace_s=1"]
    done = command("infer.py", *words, f"hydra.run.dir={tmp_path}/run", model=False)
    assert done.returncode == 1, done.stderr
    record = store.load(tmp_path / "run")
    assert (record.task, record.status) == ("infer", "timed_out")
    assert "could not be made" in record.error["message"]
    assert not [path for path in (own_cache / "quantized").glob("*") if path.is_dir() and ".tmp-" not in path.name]


@pytest.mark.slow
def test_a_job_makes_what_it_lacks_in_a_process_of_its_own_and_only_once(command, tmp_path, wide_model, own_cache):
    words = ["model=custom", f"model.source={wide_model}", "quant=gptq", *FEW, "limit=1", "engine.max_new_tokens=4"]
    first = command("infer.py", *words, f"hydra.run.dir={tmp_path}/first", model=False)
    assert first.returncode == 0, first.stderr
    assert "quantized layer 2 of 2" in first.stderr
    made, used = (store.load(tmp_path / "first" / name) for name in ("making", "."))
    assert (made.task, made.status, used.task, used.status) == ("quantize", "ok", "infer", "ok")
    assert made.kernel["linear"] == used.kernel["linear"] == "TorchAtenLinear"
    assert used.readings["make_time"].value == made.readings["make_time"].value > 0
    second = command("infer.py", *words, "rerun=true", f"hydra.run.dir={tmp_path}/second", model=False)
    assert second.returncode == 0, second.stderr
    assert "making" not in second.stderr
    assert not (tmp_path / "second" / "making").exists()


@pytest.mark.slow
def test_make_quantize_makes_a_checkpoint_ahead_of_its_use(tmp_path, wide_model, own_cache):
    words = ["gpu=cpu", "model=custom", f"model.source={wide_model}", "quant=gptq", *FEW]
    command = [sys.executable, "-m", "llm_at_home.tasks.quantize", *words, f"hydra.run.dir={tmp_path}/run"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    record = store.load(tmp_path / "run")
    assert record.readings["bits_per_weight_on_disk"].value > 4
    assert any("kept in" in note for note in record.notes)
    assert not base.needs_making(resolved("infer", wide_model, "quant=gptq", *FEW))


def test_a_kernel_takes_the_bits_of_every_layer():
    """Of a checkpoint that gives some layers other bits, the rest has the checkpoint's own."""
    stored = SimpleNamespace(bits=8, dynamic={"+:q_proj": {"bits": 4}, "-:k_proj": {}})
    assert gptq_checkpoint._bits_of(stored) == [4, 8]
    assert gptq_checkpoint._bits_of(SimpleNamespace(bits=4, dynamic=None)) == [4]
