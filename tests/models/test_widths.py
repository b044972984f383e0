"""The widths of a model's layers are told without loading it, and are those that it then has."""

from __future__ import annotations

import json

import pytest

from llm_at_home.errors import Refusal
from llm_at_home.models import source
from llm_at_home.models.embedded import ensure_converted
from llm_at_home.quantization import rtn


def model(where, weights="pretrained", architecture=None):
    return {
        "name": "m",
        "source": str(where),
        "revision": None,
        "weights": weights,
        "architecture": architecture,
        "use_safetensors": True,
        "chat_template": None,
        "trust_remote_code": False,
    }


def real_sides(folder):
    from transformers import AutoModelForCausalLM

    from llm_at_home.quantization.layers import linear_layers

    layers = dict(linear_layers(AutoModelForCausalLM.from_pretrained(folder))).values()
    return {layer.in_features for layer in layers}, {layer.out_features for layer in layers}


def sides(where):
    return source.widths(model(where)), source.outputs(model(where))


def test_widths_of_a_folder_and_of_the_embedded_model_are_the_real_ones(tiny_model):
    assert sides(tiny_model) == real_sides(tiny_model)
    assert sides("embedded") == sides(ensure_converted()) == real_sides(ensure_converted())


def test_heads_that_do_not_add_up_to_the_stream_have_a_width_of_their_own(tmp_path):
    shape = {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "head_dim": 128}))
    assert source.widths(model(tmp_path)) == {1024, 3072, 2048}


def test_widths_of_a_hub_model_come_from_the_hub_s_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert source.widths(model("some/model")) == set()
    cache = tmp_path / "models--some--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots" / "abc").mkdir(parents=True)
    shape = {"model_type": "llama", "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6}
    (cache / "snapshots" / "abc" / "config.json").write_text(json.dumps(shape))
    assert source.widths(model("some/model")) == {96, 160}


def test_an_architecture_counts_where_its_weights_are_random_or_not_here_yet(tiny_model):
    shape = {"model_type": "llama", "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6}
    assert source.widths(model(tiny_model, "random", shape)) == {96, 160}
    assert source.widths(model(tiny_model, "pretrained", shape)) == {64, 128}
    assert source.widths(model("not/here", "pretrained", shape)) == {96, 160}


@pytest.mark.parametrize("shape", [{"model_type": "gpt2", "n_embd": 768}, {"model_type": "llama"}, {}])
def test_widths_that_cannot_be_told_refuse_nothing(tmp_path, shape):
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert source.widths(model(tmp_path)) == set()
    source.check_group_size(model(tmp_path), 7)


def test_a_group_size_with_a_remainder_is_refused_before_loading():
    quant = {"bits": 4, "scheme": "symmetric", "granularity": "group", "group_size": 128}
    config = {"model": model("embedded"), "quant": quant}
    with pytest.raises(Refusal, match="layers of 576 inputs: give a divisor of 192"):
        rtn.check(config)
    rtn.check({**config, "quant": {**quant, "group_size": 64}})
    rtn.check({**config, "quant": {**quant, "granularity": "channel"}})
