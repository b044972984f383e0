"""Files that we write, read back tensor by tensor, and their tokenizers as llama.cpp reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_at_home.data.texts import load_texts
from llm_at_home.errors import Refusal
from llm_at_home.generation.llamacpp import FileTokenizer, LlamaCppEngine
from llm_at_home.models.embedded import gguf_path
from llm_at_home.quantization import gguf_write
from llm_at_home.quantization.gguf_file import GGUFFile
from llm_at_home.quantization.gguf_vocab import LLAMA3_SPLIT, tokenizer_kind

MARKS = ["<|end|>", "<|user|>"]
SPLITS = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")],
}
TEXTS = [
    "Hello, world! It's 1234567 o'clock.",
    "  indented   12  34\n\n\ttabs and\r\nlines \n",
    "naïve café, 東京, Привет 👋🏽 ½",
    "<|user|>a mark in the text<|end|>",
    "don't I'LL we've x=y+1; print('a')//b",
]


def byte_level(name: str) -> Any:
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name != "llama-bpe")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*SPLITS[name], last])
    tokenizer.decoder = decoders.ByteLevel()
    trained(tokenizer, [], pre_tokenizers.ByteLevel.alphabet())
    return wrapped(tokenizer)


def sentencepiece() -> Any:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained(tokenizer, ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))], [])
    return wrapped(tokenizer, unk_token="<unk>")


def trained(tokenizer: Tokenizer, special: list[str], alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(load_texts("held_out", 10), trainer)
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])


def wrapped(tokenizer: Tokenizer, **special: str) -> Any:
    if special:  # the trainer needs byte tokens to be special, and no tokenizer has them so
        rules = json.loads(tokenizer.to_str())
        rules["added_tokens"] = [t for t in rules["added_tokens"] if not t["content"].startswith("<0x")]
        tokenizer = Tokenizer.from_str(json.dumps(rules))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|user|>", **special)


def llama(vocabulary: int, **changed: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changed, initializer_range=0.2)).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level("gpt-2")


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> LlamaForCausalLM:
    return llama(len(tokenizer))


def written(folder: Path, model: Any, tokenizer: Any, kind: str = "F32") -> GGUFFile:
    path = folder / f"{kind}.gguf"
    gguf_write.write(path, model, tokenizer, kind, "tiny")
    return GGUFFile(path)


# The largest error of a weight, as a share of its block's (largest magnitude, range), besides the scale's own rounding.
BOUNDS = {
    "F32": (0, 0),
    "F16": (2**-11, 0),
    "BF16": (2**-8, 0),
    "Q8_0": (1 / 254, 0),
    "Q5_1": (0, 1 / 62),
    "Q4_1": (0, 1 / 30),
    # The grid of these is one step shorter on one side.
    "Q5_0": (1 / 16, 0),
    "Q4_0": (1 / 8, 0),
}


@pytest.mark.parametrize("kind", BOUNDS)
def test_each_weight_comes_back_within_the_bound_of_its_type_and_no_closer(kind, model, tokenizer, tmp_path) -> None:
    file = written(tmp_path, model, tokenizer, kind)
    stored = {tensor.name: tensor for tensor in file.tensors}
    of_magnitude, of_range = BOUNDS[kind]
    shares = []
    for name, weight in model.named_parameters():
        tensor = stored.pop(gguf_write.file_name(name, 2))
        read = torch.from_numpy(file.dequantized(tensor))
        heads = gguf_write.heads_of(name, model.config)
        read = gguf_write.unpermute(read, heads) if heads else read
        if tensor.type != kind:
            assert (tensor.type, weight.ndim == 1) in (("F32", True), ("Q8_0", False))
            assert tensor.type == "F32" or name == "model.embed_tokens.weight"
            continue
        assert kind == "F32" or weight.ndim == 2
        blocks, error = weight.detach().reshape(-1, 32), (read - weight.detach()).abs().reshape(-1, 32)
        magnitude = blocks.abs().amax(1, keepdim=True)
        bound = of_magnitude * magnitude + of_range * (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True))
        shares.append(float((error / (bound + 2**-9 * magnitude * (kind[0] == "Q"))).max()) if bound.any() else 0.0)
        assert (error <= bound + 2**-9 * magnitude * (kind[0] == "Q")).all(), name
    assert not stored
    assert max(shares) > 0.5 or kind == "F32"
    assert file.linear_types() == {kind: 14}


def test_a_row_that_is_no_whole_number_of_blocks_stays_sixteen_bits(tokenizer, tmp_path) -> None:
    file = written(tmp_path, llama(len(tokenizer), intermediate_size=80), tokenizer, "Q4_0")
    assert file.linear_types() == {"Q4_0": 12, "F16": 2}
    assert {tensor.name for tensor in file.tensors if tensor.type == "F16"} == {
        "blk.0.ffn_down.weight",
        "blk.1.ffn_down.weight",
    }


def test_weights_that_float16_cannot_hold_are_refused_and_not_written_as_infinite(tokenizer, tmp_path) -> None:
    model = llama(len(tokenizer))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = -1e5
    with pytest.raises(Refusal, match=r"layers\.1\.mlp\.up_proj\.weight holds .* use type BF16"):
        written(tmp_path, model, tokenizer, "F16")
    written(tmp_path, model, tokenizer, "BF16")


def test_what_the_header_says_is_what_the_gguf_package_reads(model, tokenizer, tmp_path) -> None:
    file = written(tmp_path, model, tokenizer, "Q4_1")
    reader = GGUFReader(file.path)
    expected = [(t.name, t.tensor_type.name, tuple(t.shape[::-1]), t.data_offset, t.n_bytes) for t in reader.tensors]
    assert [(t.name, t.type, t.shape, t.offset, t.bytes) for t in file.tensors] == expected
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert file.metadata[key] == pytest.approx(field.contents()), key
    readings = file.size_readings()
    assert readings["bits_per_weight"].value == 5.0
    assert readings["checkpoint_size"].value == file.path.stat().st_size / 1e9
    assert {reading.method for reading in readings.values()} == {"tensors_on_disk", "file_size"}


def test_a_file_that_is_cut_off_or_something_else_is_refused(model, tokenizer, tmp_path) -> None:
    whole = written(tmp_path, model, tokenizer).path.read_bytes()
    path = tmp_path / "broken.gguf"
    for content, why in (
        (whole[:-100], "cut off"),
        (whole[:5000], "no whole"),
        (b"GGML" + whole[4:], "begin with GGUF"),
    ):
        path.write_bytes(content)
        with pytest.raises(Refusal, match=why):
            GGUFFile(path)
    path.write_bytes(b"")
    with pytest.raises(Refusal, match="no whole"):
        GGUFFile(path)
    with pytest.raises(Refusal, match="no model file"):
        GGUFFile(tmp_path / "none.gguf")


def test_one_of_several_parts_is_refused_since_its_sizes_are_not_the_model_s(tmp_path) -> None:
    writer = GGUFWriter(tmp_path / "model-00001-of-00003.gguf", "qwen2")
    writer.add_uint16("split.no", 0)
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(Refusal, match="one of 3 parts of a model: join them"):
        GGUFFile(tmp_path / "model-00001-of-00003.gguf")


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    with torch.inference_mode():
        out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return out[0, len(prompt) :].tolist()


def served_greedy(file: GGUFFile, prompt: list[int], count: int) -> list[int]:
    """Not streamed: the stream has no ids for the bytes that such a model says."""
    engine = LlamaCppEngine(file.path, None, count, context=512, threads=1)
    body = {"prompt": prompt, "n_predict": count, "temperature": 0, "return_tokens": True, "ignore_eos": True}
    tokens = engine.ask("/completion", body)["tokens"]
    engine.close()
    return tokens


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES = {
    "grouped queries, tied": {},
    "Llama 3.1's frequencies, untied": {"rope_parameters": LLAMA3, "tie_word_embeddings": False},
    "linear frequencies": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    "biases, wide heads": {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
}

# What it is that makes the two agree: without it they do not.
LEFT_OUT = {
    "grouped queries, tied": "permute",
    "Llama 3.1's frequencies, untied": "_rope_factors",
    "linear frequencies": "_rope_factors",
}
TOKENS = 16  # llama.cpp keeps keys and values in float16, which turns near ties later on


@pytest.mark.parametrize("shape", SHAPES)
def test_llamacpp_computes_the_same_as_transformers(shape, tokenizer, tmp_path, monkeypatch) -> None:
    model = llama(len(tokenizer), **SHAPES[shape])
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    prompt = tokenizer(TEXTS[0] * 4)["input_ids"]
    expected = greedy(model, prompt, TOKENS)
    assert len(set(expected)) > 4, "a model that repeats itself would prove little"
    assert served_greedy(written(tmp_path, model, tokenizer), prompt, TOKENS) == expected
    left_out = LEFT_OUT.get(shape)
    if left_out:
        monkeypatch.setattr(gguf_write, left_out, lambda model, *heads: model if heads else None)
        assert served_greedy(written(tmp_path, model, tokenizer), prompt, TOKENS) != expected


@pytest.mark.parametrize("name", [*SPLITS, "sentencepiece"])
def test_llamacpp_splits_text_as_transformers_does(name, tmp_path) -> None:
    own = sentencepiece() if name == "sentencepiece" else byte_level(name)
    kind = ("llama", "default") if name == "sentencepiece" else ("gpt2", name)
    assert tokenizer_kind(json.loads(own.backend_tokenizer.to_str())) == kind
    file = written(tmp_path, llama(len(own) + 3), own)
    assert file.metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{len(own) + 2}]"
    engine = LlamaCppEngine(file.path, own, 4, context=256, threads=1)
    served = FileTokenizer(engine)
    for text in TEXTS[: 3 if name == "sentencepiece" else None]:  # after a mark the two kinds of SentencePiece differ
        ids = own(text, add_special_tokens=False)["input_ids"]
        assert served(text, add_special_tokens=name == "sentencepiece")["input_ids"] == ids, text
        assert len(set(ids)) > 5
    engine.close()


def test_the_embedded_model_s_vocabulary_is_that_of_the_file_it_came_from(tiny_model, tmp_path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    ours, theirs = written(tmp_path, model, tokenizer).metadata, GGUFFile(gguf_path()).metadata
    for key in ("tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "unknown_token_id", "add_bos_token"):
        assert ours[f"tokenizer.ggml.{key}"] == theirs[f"tokenizer.ggml.{key}"], key
    assert ours["tokenizer.chat_template"] == theirs["tokenizer.chat_template"]


def test_what_the_writer_does_not_know_is_refused(tokenizer) -> None:
    known = llama(len(tokenizer)).config.to_dict()
    gguf_write.check_architecture(known)
    for changed, why in (
        ({"model_type": "qwen2"}, "this one is qwen2"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "of type yarn"),
        ({"hidden_act": "gelu"}, "with gelu"),
    ):
        with pytest.raises(Refusal, match=why):
            gguf_write.check_architecture(known | changed)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for changed, why in (
        ({"model": {"type": "Unigram"}}, "Unigram"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "way of splitting"),
        ({"normalizer": {"type": "NFC"}}, "way of splitting"),
    ):
        with pytest.raises(Refusal, match=why):
            tokenizer_kind(rules | changed)


QUANTIZER = {"reason": "the extra gguf-k is not installed"}
# Relative error of the values of a type, root mean square, on random weights: twice what was seen, or less.
ERRORS = {"Q2_K": 0.4, "Q3_K": 0.2, "IQ3_S": 0.2, "Q4_K": 0.1, "IQ4_XS": 0.1, "Q5_K": 0.05, "Q6_K": 0.03}


@pytest.mark.parametrize(
    ("kind", "main"), [("Q4_K_M", "Q4_K"), ("Q2_K", "Q2_K"), ("IQ4_XS", "IQ4_XS"), ("IQ3_S", "IQ3_S")]
)
def test_llamacpp_s_quantizer_makes_the_other_types_of_rows_of_256(kind, main, tokenizer, tmp_path) -> None:
    pytest.importorskip("llama_cpp", **QUANTIZER)
    dense = written(tmp_path, llama(len(tokenizer), hidden_size=256, intermediate_size=512), tokenizer)
    path = tmp_path / "small.gguf"
    gguf_write.quantize_file(dense.path, path, kind, threads=1)
    file = GGUFFile(path)
    assert next(iter(file.linear_types())) == main
    before = {tensor.name: tensor for tensor in dense.tensors}
    for tensor in file.tensors:
        values, wanted = file.dequantized(tensor), dense.dequantized(before[tensor.name])
        error = float(((values - wanted) ** 2).mean() ** 0.5 / (wanted**2).mean() ** 0.5)
        assert error <= ERRORS.get(tensor.type, 0), tensor
        assert tensor.type == "F32" or error > ERRORS[tensor.type] / 4, tensor


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_1"])
def test_what_python_writes_is_what_llamacpp_s_quantizer_writes(kind, model, tokenizer, tmp_path) -> None:
    pytest.importorskip("llama_cpp", **QUANTIZER)
    path = tmp_path / "theirs.gguf"
    gguf_write.quantize_file(written(tmp_path, model, tokenizer).path, path, kind, threads=1)
    ours, theirs = written(tmp_path, model, tokenizer, kind), GGUFFile(path)
    found = {tensor.name: tensor for tensor in theirs.tensors}
    for tensor in ours.tensors:
        assert tensor.type == found[tensor.name].type, tensor
        assert (ours.dequantized(tensor) == theirs.dequantized(found[tensor.name])).mean() > 0.999, tensor


def test_k_types_fall_back_in_rows_that_256_does_not_divide(model, tokenizer, tmp_path) -> None:
    pytest.importorskip("llama_cpp", **QUANTIZER)
    path = tmp_path / "small.gguf"
    gguf_write.quantize_file(written(tmp_path, model, tokenizer).path, path, "Q4_K_M", threads=1)
    types = GGUFFile(path).linear_types()
    assert sum(types.values()) == 14
    assert set(types) <= {"Q5_0", "Q8_0", "Q5_1", "Q4_0"}
