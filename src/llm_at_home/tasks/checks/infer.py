"""What cannot be answered, measured, talked to or served."""

from __future__ import annotations

import importlib.util
import ipaddress
import socket
from collections.abc import Mapping
from typing import Any

from llm_at_home.adapters.attach import adapter_folder
from llm_at_home.errors import Refusal
from llm_at_home.models import source
from llm_at_home.tasks.checks.synthetic import check_synthetic


def check(config: Mapping[str, Any]) -> None:
    """Refuse inference that cannot work."""
    if config["engine"]["name"] == "llamacpp" and config["quant"]["method"] != "gguf":
        hint = "use quant=gguf (quant.type=F16 or F32 is unquantized), or engine=eager"
        raise Refusal(f"engine=llamacpp runs .gguf files, and quant={config['quant']['name']} is none: {hint}")
    if config["mode"] not in ("bench", "chat", "serve"):
        raise Refusal(f"mode={config['mode']} is unknown: choose bench, chat or serve")
    if config["adapters"] and not (config["mode"] != "bench" and config["adapter_path"]):
        raise Refusal("adapters= is for mode=chat and mode=serve: name the first one with adapter_path=")
    for path in config["adapters"].values():
        adapter_folder(path)
    if config["repeats"] < 1:
        raise Refusal(f"repeats={config['repeats']} is too small: give at least 1")
    if config["samples"] < 1:
        raise Refusal(f"samples={config['samples']} is too small: give at least 1")
    if config["samples"] > 1 and config["engine"].get("temperature") == 0:
        raise Refusal("samples= of greedy answers would all be alike: leave out engine.temperature=0, or samples=")
    if config["engine"].get("batch_size", 1) < 1:
        raise Refusal(f"engine.batch_size={config['engine']['batch_size']} is too small: give at least 1")
    if config["mode"] == "chat" and config["model"]["weights"] == "random":
        raise Refusal("random weights have nothing to say: mode=chat needs model.weights=pretrained")
    _check_graph(config)
    if config["mode"] == "serve":
        _check_serve(config)
    check_synthetic(config, "questions")


def _check_graph(config: Mapping[str, Any]) -> None:
    kernels, device = config["engine"].get("kernels", "auto"), config["gpu"]["device"]
    if kernels not in ("auto", "triton", "torch"):
        raise Refusal(f"engine.kernels={kernels} is unknown: choose auto, triton or torch")
    if kernels == "triton" and (device == "cpu" or importlib.util.find_spec("triton") is None):
        lacks = "a GPU" if device == "cpu" else "Triton (pip install triton)"
        raise Refusal(f"engine.kernels=triton needs {lacks}: use engine.kernels=torch")
    pages = config["engine"].get("pages")
    if pages is not None and (type(pages) is not int or pages < 1):
        raise Refusal(f"engine.pages={pages} is no number of pages: give at least 1, or null")


def _check_serve(config: Mapping[str, Any]) -> None:
    serve, model = config["serve"], config["model"]
    if model["weights"] == "random" and model["architecture"]:
        hint = "give model.source=FOLDER with a config.json and a tokenizer, or model.weights=pretrained"
        raise Refusal(f"{model['name']} with random weights has no tokenizer to be served with: {hint}")
    try:
        is_loopback = ipaddress.ip_address(serve["host"]).is_loopback
    except ValueError:
        raise Refusal(f"serve.host={serve['host']} is no address: give one such as 127.0.0.1") from None
    if not is_loopback and not serve["api_key"]:
        raise Refusal(f"serve.host={serve['host']} lets everybody in the network ask: give serve.api_key as well")
    for key in ("context", "queue"):
        if serve[key] is not None and serve[key] < 1:
            raise Refusal(f"serve.{key}={serve[key]} is too small: give at least 1")
    # A file that the user named says itself what it knows, to llama.cpp.
    longest = None if config["quant"].get("path") else source.shape(model).get("max_position_embeddings")
    if longest and serve["context"] and serve["context"] > longest:
        hint = f"give {longest} or null"
        raise Refusal(f"serve.context={serve['context']} is longer than {config['model']['name']} knows: {hint}")
    try:
        with socket.create_server((serve["host"], serve["port"])):
            pass
    except OSError as error:
        raise Refusal(f"serve.port={serve['port']} cannot be had ({error.strerror}): give another") from None
