from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_at_home.adapters import loftq
from llm_at_home.errors import Refusal
from llm_at_home.models import loading
from llm_at_home.models.chat import TEMPLATES

ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.02,
}


def group(where: Path | str, **changes: Any) -> dict[str, Any]:
    return {
        "name": "x",
        "source": str(where),
        "revision": None,
        "weights": "pretrained",
        "trust_remote_code": False,
        "use_safetensors": True,
        "chat_template": None,
        "architecture": None,
        **changes,
    }


RANDOM = group("meta-llama/Llama-2-7b-hf", name="llama2_7b", weights="random", architecture=ARCHITECTURE)


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model, to be spoilt."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def one_line(action: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(Refusal) as caught:
        action(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


# -- from a folder


def test_weights_that_a_file_lacks_are_not_made_up(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    (file,) = copy.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    assert "lacks 1 of its weights, model.layers.1.mlp.down_proj.weight" in one_line(
        loading.load_weights, group(copy), "float32", "cpu"
    )


def test_a_folder_is_loaded_with_its_weights_in_the_dtype_asked_for(tiny_model: Path) -> None:
    from safetensors.torch import load_file

    (file,) = tiny_model.glob("*.safetensors")
    stored = load_file(file)["model.layers.1.mlp.down_proj.weight"]
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = loading.load_weights(group(tiny_model), name, "cpu")
        assert not model.training
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert torch.equal(model.model.layers[1].mlp.down_proj.weight, stored.to(dtype))
    assert loading.load_config(group(tiny_model)).hidden_size == 64


def test_a_tokenizer_comes_with_padding_and_a_template(copy: Path) -> None:
    assert "im_start" in loading.load_tokenizer(group(copy)).chat_template
    assert loading.load_tokenizer(group(copy, chat_template="guanaco")).chat_template == TEMPLATES["guanaco"]
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    settings.pop("chat_template", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("special_tokens_map.json", "chat_template.jinja"):
        (copy / name).unlink(missing_ok=True)
    assert "x has no chat template" in one_line(loading.load_tokenizer, group(copy))
    bare = loading.load_tokenizer(group(copy, chat_template="chatml"))
    assert bare.pad_token == bare.eos_token


@pytest.mark.parametrize(
    ("spoil", "load", "message"),
    [
        (lambda f: (f / "config.json").write_text("{nope"), loading.load_config, "not a valid JSON"),
        (lambda f: (f / "config.json").write_text("{}"), loading.load_config, "model_type"),
        (lambda f: (f / "config.json").write_text('{"model_type": "nope"}'), loading.load_config, "nope"),
        (lambda f: [p.unlink() for p in f.glob("tok*")], loading.load_tokenizer, "cannot be loaded"),
    ],
    ids=["broken config", "empty config", "unknown architecture", "no tokenizer"],
)
def test_a_spoilt_folder_ends_in_one_line(copy: Path, spoil: Any, load: Any, message: str) -> None:
    spoil(copy)
    text = one_line(load, group(copy))
    assert text.startswith(str(copy))
    assert message in text


def test_weights_cut_short_end_in_one_line(copy: Path) -> None:
    (file,) = copy.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    assert "cannot be loaded" in one_line(loading.load_weights, group(copy), "float32", "cpu")


def test_pickled_weights_are_not_read_unless_allowed(copy: Path) -> None:
    model = loading.load_weights(group(copy), "float32", "cpu")
    (file,) = copy.glob("*.safetensors")
    file.unlink()
    torch.save(model.state_dict(), copy / "pytorch_model.bin")
    assert "cannot be loaded" in one_line(loading.load_weights, group(copy), "float32", "cpu")
    again = loading.load_weights(group(copy, use_safetensors=False), "float32", "cpu")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_code_of_the_models_own_is_not_run_unless_allowed(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import PretrainedConfig\n"
        f"Path({str(copy / 'it_ran')!r}).touch()\n"
        "class Own(PretrainedConfig):\n    model_type = 'own'\n"
    )
    assert "model.trust_remote_code=true" in one_line(loading.load_config, group(copy))
    assert not (copy / "it_ran").exists()


# -- random weights


def test_random_weights_need_no_download_and_have_the_configured_spread() -> None:
    model = loading.load_weights(RANDOM, "bfloat16", "cpu")
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.num_hidden_layers == 2
    weight = model.model.layers[0].mlp.down_proj.weight.float()
    assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.15)
    assert torch.isfinite(model(torch.arange(10)[None]).logits).all()
    assert RANDOM["architecture"]["model_type"] == "llama", "the configuration itself is left alone"


def test_random_weights_of_a_folder_have_its_architecture_and_not_its_weights(tiny_model: Path) -> None:
    random = loading.load_weights(group(tiny_model, weights="random"), "float32", "cpu")
    stored = loading.load_weights(group(tiny_model), "float32", "cpu")
    assert [p.shape for p in random.parameters()] == [p.shape for p in stored.parameters()]
    assert not torch.equal(random.model.layers[0].mlp.up_proj.weight, stored.model.layers[0].mlp.up_proj.weight)


def test_an_architecture_alone_has_no_tokenizer() -> None:
    assert not loading.has_tokenizer(RANDOM)
    text = one_line(loading.load_tokenizer, RANDOM)
    assert "llama2_7b with random weights has no tokenizer" in text
    assert "questions=synthetic" in text


def test_random_weights_of_a_folder_keep_its_tokenizer(tiny_model: Path) -> None:
    assert loading.has_tokenizer(group(tiny_model, weights="random"))
    assert loading.load_tokenizer(group(tiny_model, weights="random")).eos_token == "<|im_end|>"


# -- the hub's ways of saying no


def test_offline_a_hub_model_ends_in_one_line() -> None:
    # tests/conftest.py sets HF_HUB_OFFLINE before huggingface_hub is imported.
    hub = group("someone/thing")
    for load in (loading.load_config, loading.load_tokenizer):
        text = one_line(load, hub)
        assert text.startswith("someone/thing cannot be downloaded (no network?)")
        assert "model.source=FOLDER" in text
    assert "cannot be downloaded" in one_line(loading.load_weights, hub, "float32", "cpu")


def hub_error(name: str) -> Exception:
    from huggingface_hub import errors

    kind = getattr(errors, name)
    if not issubclass(kind, errors.HfHubHTTPError):
        return kind("no")
    return kind("no", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped by transformers", "bare"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("GatedRepoError", "is gated: accept its licence on the hub, then run `hf auth login`"),
        ("RevisionNotFoundError", "has no such revision: mend model.revision"),
        ("RepositoryNotFoundError", "is not on the hub, or is private: check model.source"),
        ("LocalEntryNotFoundError", "cannot be downloaded (no network?)"),
        ("OfflineModeIsEnabled", "cannot be downloaded (no network?)"),
    ],
)
def test_each_of_the_hubs_errors_says_what_to_do(name: str, message: str, wrapped: bool) -> None:
    def fail() -> None:
        with loading.hub_errors("someone/thing"):
            try:
                raise hub_error(name)
            except Exception as error:
                if wrapped:
                    raise OSError("There was a problem\nof several lines") from error
                raise

    assert f"someone/thing {message}" in one_line(fail)


def test_errors_that_are_nobodys_mistake_pass_unchanged() -> None:
    for error in (RuntimeError("CUDA out of memory"), Refusal("as it is"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, loading.hub_errors("x"):
            raise error
        assert caught.value is error


def test_a_library_that_knows_no_revision_is_given_that_revision_s_files(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--some--thing"
    for name, commit in (("main", "a" * 40), ("gptq-8bit", "b" * 40)):
        (cache / "refs").mkdir(parents=True, exist_ok=True)
        (cache / "refs" / name).write_text(commit)
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "config.json").write_text("{}")
    assert Path(loading.fetched(group("some/thing", revision="gptq-8bit"))).name == "b" * 40
    assert loading.fetched(group("some/thing")) == "some/thing"
    assert loading.fetched(group(tmp_path, revision="gptq-8bit")) == str(tmp_path)
    # LoftQ reads the unquantized weights of the commit that was loaded.
    base = SimpleNamespace(name_or_path="some/thing", config=SimpleNamespace(_commit_hash="b" * 40))
    assert loftq._folder(base).name == "b" * 40
