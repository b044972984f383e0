"""GGUF: llama.cpp's files, run by llama.cpp; given as a file, or made here of the transformers model of ``model=``."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.models import source
from llm_at_home.models.loading import load_config, load_tokenizer, load_weights
from llm_at_home.quantization import gguf_write, modelfile
from llm_at_home.quantization.gguf_file import HEAD, GGUFFile
from llm_at_home.records.cached import cached, is_made
from llm_at_home.records.hashing import package_versions
from llm_at_home.records.schema import Reading

KIND = "quantized"
FILE = "model.gguf"
MADE = "making.json"
# What the Python package writes; the rest takes llama.cpp's own quantizer.
WRITTEN = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
QUANTIZED = (
    *("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K"),
    *("IQ4_NL", "IQ4_XS", "IQ3_M", "IQ3_S"),
)
# llama.cpp's mixtures of the first two give queries and keys IQ3_XXS and IQ2_S, which it refuses without a matrix.
WITH_MATRIX = ("IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
EXTRA = "gguf-k"
# ``load`` gives plain linear layers on purpose: a dense copy of the file's weights, to measure what they lost.
DENSE_COPY = True


def complete(config: dict[str, Any], named: Collection[str]) -> None:
    """A ``.gguf`` file is the model itself, unless it is to be compared with the model that it was made of.

    Args:
        config: being resolved; changed in place.
        named: the keys that the user gave.
    """
    model, quant = config["model"], config["quant"]
    if source.is_gguf(model["source"]):
        quant["path"] = quant["path"] or model["source"]
    if quant["path"]:
        quant["type"] = None
        if config.get("task") != "fidelity":
            model |= {"source": quant["path"], "architecture": None, "revision": None}
            if not {"model", "model.name"} & set(named):
                model["name"] = Path(quant["path"]).stem


def check(config: Mapping[str, Any]) -> None:
    """Refuse what llama.cpp, or the writer of its files, cannot do.

    Raises:
        Refusal: with one line that says what to change.
    """
    quant, model = config["quant"], config["model"]
    if quant.get("bits") is not None:
        raise Refusal(f"quant.bits={quant['bits']} changes nothing of quant=gguf: choose with quant.type=")
    if "adapter" in config:
        raise Refusal("llama.cpp's files cannot be trained on: use quant=nf4, or quant=none")
    if config.get("adapter_path"):
        raise Refusal("llama.cpp cannot put this adapter on a file: leave out adapter_path, or use quant=nf4")
    if "engine" in config and config["engine"]["name"] != "llamacpp":
        raise Refusal(f"engine={config['engine']['name']} cannot run quant=gguf: use engine=llamacpp, or leave it out")
    if config.get("task") == "text" and config["text"]["perplexity"]:
        raise Refusal(
            "llama.cpp's server gives no log-probabilities of a text: use text.perplexity=false, or task=fidelity"
        )
    if config.get("task") == "text" and quant["path"]:
        raise Refusal(
            "task=text makes its prompts with transformers' tokenizer: name the model with model=, and a type that is "
            "made of it with quant.type= in place of quant.path="
        )
    if quant["path"]:
        file = GGUFFile(Path(quant["path"]).expanduser())
        if config.get("task") == "fidelity":
            _check_readable(file)
            if source.is_gguf(model["source"]):
                raise Refusal(
                    "task=fidelity needs the unquantized model: name it with model=, and the file with quant.path="
                )
        return
    if model["weights"] == "random":
        raise Refusal("quant=gguf is not made of random weights: use quant.path=FILE, or model.weights=pretrained")
    _check_type(config)
    check_model(model)


def check_model(model: Mapping[str, Any]) -> None:
    """Refuse a model that the writer does not know, as far as that can be told without loading.

    Raises:
        Refusal: naming what it does not know.
    """
    shape = source.shape(model)
    if shape:
        gguf_write.check_architecture(shape)


def _check_type(config: Mapping[str, Any]) -> None:
    kind = config["quant"]["type"]
    if kind in WITH_MATRIX:
        raise Refusal(f"quant.type={kind} needs an importance matrix: make it with llama.cpp and give quant.path=FILE")
    if kind not in WRITTEN + QUANTIZED:
        raise Refusal(f"quant.type={kind} is unknown: choose one of {', '.join(WRITTEN + QUANTIZED)}")
    if kind in QUANTIZED and importlib.util.find_spec("llama_cpp") is None and not is_made(KIND, file_key(config)):
        hint = f"pip install 'llm-at-home[{EXTRA}]' (it compiles for minutes), or use quant.type=Q4_1"
        raise Refusal(f"quant.type={kind} is made by llama-cpp-python, which is not installed: {hint}")


def _check_readable(file: GGUFFile) -> None:
    if file.architecture != "llama":
        raise Refusal(
            f"task=fidelity reads back Llama files, and {file.path.name} is {file.architecture}: give another"
        )


def file_key(config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a made file depends on."""
    kind = config["quant"]["type"]
    maker = {"writer": gguf_write.WRITER} | ({"quantizer": "llama.cpp"} if kind in QUANTIZED else {})
    template = {"chat_template": config["model"]["chat_template"]}
    return {"source": source.identity(config["model"]), "method": "gguf", "type": kind, **maker, **template}


def needs_making(config: Mapping[str, Any]) -> bool:
    """Whether a file must be made first: none is named, and the cache has none."""
    return not config["quant"]["path"] and not is_made(KIND, file_key(config))


def ensure(config: Mapping[str, Any]) -> Path:
    """The model file: the one that ``quant.path`` names, or one made now if it is not in the cache.

    Raises:
        Refusal: for an architecture or a tokenizer that the writer does not know.
    """
    if config["quant"]["path"]:
        return Path(config["quant"]["path"]).expanduser()
    tokenizer = load_tokenizer(config["model"])  # first, since it fetches what identifies a model of the hub
    key = file_key(config)
    if not is_made(KIND, key):
        print(f"making {config['quant']['type']} of {config['model']['name']}, once", file=sys.stderr)
    return cached(KIND, key, lambda folder: _make(config, tokenizer, folder)) / FILE


def _make(config: Mapping[str, Any], tokenizer: Any, folder: Path) -> None:
    start = time.perf_counter()
    kind, name = config["quant"]["type"], config["model"]["name"]
    shape = load_config(config["model"])
    stored = str(shape.dtype or "float32").removeprefix("torch.")
    model = load_weights(config["model"], stored, "cpu")
    if kind in WRITTEN:
        gguf_write.write(folder / FILE, model, tokenizer, kind, name)
    else:
        dense = folder / "dense.gguf"
        gguf_write.write(dense, model, tokenizer, gguf_write.DENSE[stored], name)
        del model
        gguf_write.quantize_file(dense, folder / FILE, kind)
        dense.unlink()
    modelfile.write(folder / FILE, tokenizer, shape.max_position_embeddings)
    made = {"seconds": time.perf_counter() - start, "packages": package_versions(("gguf", "llama-cpp-python"))}
    (folder / MADE).write_text(json.dumps(made))


def size_readings(file: GGUFFile) -> dict[str, Reading]:
    """The file's sizes, and ``make_time`` (s) of one that was made here."""
    readings = file.size_readings()
    made = file.path.parent / MADE
    if file.path.name == FILE and made.is_file():
        readings["make_time"] = Reading(json.loads(made.read_text())["seconds"], "s", "clock")
    return readings


def load(config: Mapping[str, Any]) -> Any:
    """The transformers model of ``model=`` with the file's weights read back, for measures that need its logits.

    Raises:
        Refusal: for a file of another architecture, or whose tensors have other shapes than the model's.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    file = GGUFFile(ensure(config))
    _check_readable(file)
    shape = load_config(config["model"])
    gguf_write.check_architecture(shape.to_dict())
    stored = {tensor.name: tensor for tensor in file.tensors}
    if HEAD in stored:
        shape.tie_word_embeddings = False  # llama.cpp computes with the file's head, whatever the model ties
    with torch.device(config["gpu"]["device"]), no_init_weights():
        model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, config["dtype"]))
    model.tie_weights()
    for name, parameter in model.named_parameters():
        tensor = stored.get(gguf_write.file_name(name, shape.num_hidden_layers))
        if tensor is None or tensor.shape != tuple(parameter.shape):
            hint = "name the model that it was made of with model="
            raise Refusal(f"{file.path.name} is no file of {config['model']['name']} ({name} differs): {hint}")
        values = torch.from_numpy(file.dequantized(tensor))
        heads = gguf_write.heads_of(name, shape)
        with torch.no_grad():
            parameter.copy_(gguf_write.unpermute(values, heads) if heads else values)
    model.llm_at_home_gguf = file  # whose types and sizes the record is to name, and not those of the copy
    return model.eval()
