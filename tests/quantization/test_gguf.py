"""quant=gguf: what is refused, what is made once, and what the dense copy for fidelity holds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_at_home.errors import Refusal
from llm_at_home.models.embedded import gguf_path
from llm_at_home.quantization import base, gguf, gguf_write
from llm_at_home.quantization.gguf_file import GGUFFile
from llm_at_home.quantization.size import size_readings
from llm_at_home.tasks import resolve

CONF = Path(__file__).resolve().parents[2] / "conf"


def config(command: str, *overrides: str) -> dict[str, Any]:
    words = ["quant=gguf", "gpu=cpu", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolve.resolve(command, compose(command, words), words)


@pytest.fixture
def of_tiny(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A configuration of the tiny model, with a cache of its own."""
    monkeypatch.setenv("LLM_AT_HOME_CACHE", str(tmp_path))
    model = ["model=custom", f"model.source={tiny_model}", "model.name=tiny"]
    return lambda *overrides, command="infer": config(command, *model, *overrides)


def test_quant_gguf_brings_llamacpp_unless_an_engine_is_named() -> None:
    assert config("infer")["engine"]["name"] == "llamacpp"
    assert config("infer", "engine.threads=1")["engine"]["threads"] == 1
    assert config("infer", "engine=eager")["engine"]["name"] == "eager"
    assert config("infer", "quant=none")["engine"]["name"] == "eager"
    assert config("evaluate", "task=text")["engine"]["name"] == "llamacpp"


@pytest.mark.parametrize(
    ("command", "overrides", "why"),
    [
        ("train", [], "cannot be trained on: use quant=nf4"),
        ("infer", ["engine=eager"], "use engine=llamacpp"),
        ("infer", ["quant=none", "engine=llamacpp"], "engine=llamacpp runs .gguf files, and quant=none is none"),
        ("infer", ["quant=nf4", "engine=llamacpp"], "quant=nf4 is none"),
        ("infer", ["adapter_path={adapter}"], "leave out adapter_path"),
        ("infer", ["quant.type=Q3_X"], "quant.type=Q3_X is unknown: choose one of F32"),
        ("infer", ["quant.type=IQ2_XS"], "needs an importance matrix"),
        ("infer", ["quant.type=IQ3_XS"], "needs an importance matrix"),
        ("infer", ["model.weights=random", "questions=synthetic"], "not made of random weights"),
        ("infer", ["quant.path=none.gguf"], "there is no file none.gguf"),
        ("infer", ["quant=nf4", "model.source={file}"], "read it with quant=gguf"),
        ("evaluate", ["task=text"], "use text.perplexity=false"),
        ("evaluate", ["task=text", "text.perplexity=false", "quant.path={file}"], "with quant.type="),
        ("evaluate", ["task=fidelity", "model.source={file}"], "needs the unquantized model"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(command, overrides, why, tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    words = [word.format(adapter=tmp_path, file=gguf_path()) for word in overrides]
    with pytest.raises(Refusal, match=why) as refused:
        resolve.check(command, config(command, *words))
    assert len(str(refused.value).splitlines()) == 1


def test_a_folder_of_another_architecture_is_refused_before_anything_loads(of_tiny, tmp_path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    (folder / "model.safetensors").touch()
    with pytest.raises(Refusal, match="this one is qwen2"):
        resolve.check("infer", config("infer", "model=custom", f"model.source={folder}"))


def test_a_model_of_the_hub_is_refused_before_it_is_fetched() -> None:
    with pytest.raises(Refusal, match="this one is qwen2"):
        gguf.check(config("infer", "model=qwen2_5_7b"))
    gguf.check(config("infer", "model=llama3_8b"))


def test_a_type_of_the_extra_is_refused_without_it_and_not_once_it_is_made(of_tiny, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    wanted = of_tiny("quant.type=Q4_K_M")
    with pytest.raises(Refusal, match="llm-at-home\\[gguf-k\\]"):
        gguf.check(wanted)
    gguf.cached(gguf.KIND, gguf.file_key(wanted), lambda folder: (folder / gguf.FILE).touch())
    gguf.check(wanted)


def test_a_file_that_is_named_is_the_model_and_its_content_is_hashed(tmp_path) -> None:
    path = tmp_path / "Some-Model.Q4_1.gguf"
    path.symlink_to(gguf_path())
    named = config("infer", f"quant.path={path}")
    resolve.check("infer", named)
    assert (named["model"]["name"], named["model"]["source"]) == ("Some-Model.Q4_1", str(path))
    assert named["quant"]["type"] is None
    found = resolve.ingredients("infer", named)
    assert (
        found["model"]["sha256"] == found["quant"]["sha256"] != resolve.ingredients("infer", config("infer"))["model"]
    )
    compared = config("evaluate", "task=fidelity", f"quant.path={path}")
    resolve.check("evaluate", compared)
    assert compared["model"]["name"] == "smollm2_135m"
    assert resolve.ingredients("evaluate", compared)["quant"] == found["quant"]


def test_a_file_is_made_once_for_each_type(of_tiny, monkeypatch, capsys) -> None:
    first = gguf.ensure(of_tiny("quant.type=Q4_0"))
    assert GGUFFile(first).linear_types() == {"Q4_0": 14}
    assert "making Q4_0 of tiny, once" in capsys.readouterr().err
    assert gguf.size_readings(GGUFFile(first))["make_time"].value > 0
    other = gguf.ensure(of_tiny("quant.type=F16"))
    monkeypatch.setattr(gguf_write, "write", lambda *arguments: pytest.fail("made again"))
    assert gguf.ensure(of_tiny("quant.type=Q4_0")) == first != other
    assert capsys.readouterr().err.count("once") == 1


def test_the_dense_copy_holds_the_file_s_weights(of_tiny, tiny_model) -> None:
    original = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    exact = base.load_base(of_tiny("quant.type=F32"))
    for (name, weight), (_, read) in zip(original.named_parameters(), exact.named_parameters(), strict=True):
        assert torch.equal(weight, read), name
    rounded = base.load_base(of_tiny("quant.type=Q4_0"))
    pairs = zip(original.state_dict().values(), rounded.state_dict().values(), strict=True)
    errors = [float((weight - read).norm() / weight.norm()) for weight, read in pairs]
    assert 0.02 < max(errors) < 0.2
    probe = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(original(probe).logits, exact(probe).logits)
        assert not torch.equal(original(probe).logits, rounded(probe).logits)
    assert base.describe_kernel(rounded)["layers"] == {"Q4_0": 14}
    assert size_readings(rounded)["bits_per_weight"].value == 4.5


def test_the_dense_copy_has_the_file_s_own_head_where_the_model_ties_it(of_tiny, tiny_model, tmp_path) -> None:
    untied = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach() * 2)
    path = tmp_path / "untied.gguf"
    gguf_write.write(path, untied, AutoTokenizer.from_pretrained(tiny_model), "F32", "tiny")
    read = base.load_base(of_tiny("task=fidelity", f"quant.path={path}", command="evaluate"))
    assert torch.equal(read.lm_head.weight, untied.lm_head.weight)
    assert torch.equal(read.model.embed_tokens.weight * 2, read.lm_head.weight)


def test_a_file_of_another_model_is_refused(of_tiny) -> None:
    with pytest.raises(Refusal, match=r"is no file of tiny .* name the model that it was made of"):
        base.load_base(of_tiny("task=fidelity", f"quant.path={gguf_path()}", command="evaluate"))
