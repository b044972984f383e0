"""What cannot be answered, measured, talked to or served."""

from __future__ import annotations

import importlib.util
import ipaddress
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_at_home.adapters.attach import adapter_folder
from llm_at_home.data.questions import questions_of
from llm_at_home.data.sources import SYNTHETIC
from llm_at_home.errors import Refusal
from llm_at_home.models import source
from llm_at_home.tasks.checks.synthetic import check_synthetic
from llm_at_home.tasks.checks.values import check_engine, is_whole

LAST_PORT = 65535


def check(config: Mapping[str, Any]) -> None:
    """Refuse inference that cannot work, and questions that nobody can read."""
    if config["engine"]["name"] == "llamacpp" and config["quant"]["method"] != "gguf":
        hint = "use quant=gguf (quant.type=F16 or F32 is unquantized), or engine=eager"
        raise Refusal(f"engine=llamacpp runs .gguf files, and quant={config['quant']['name']} is none: {hint}")
    if config["mode"] not in ("bench", "chat", "serve"):
        raise Refusal(f"mode={config['mode']} is unknown: choose bench, chat or serve")
    if config["adapters"] and not (config["mode"] != "bench" and config["adapter_path"]):
        raise Refusal("adapters= is for mode=chat and mode=serve: name the first one with adapter_path=")
    _check_names(config)
    for path in config["adapters"].values():
        adapter_folder(path)
    if not is_whole(config["repeats"]):
        raise Refusal(f"repeats={config['repeats']} is no whole number from 1 on: give at least 1")
    if not is_whole(config["samples"]):
        raise Refusal(f"samples={config['samples']} is no whole number from 1 on: give at least 1")
    if config["samples"] > 1 and config["engine"].get("temperature") == 0:
        raise Refusal("samples= of greedy answers would all be alike: leave out engine.temperature=0, or samples=")
    check_engine(config["engine"])
    if config["mode"] == "chat" and config["model"]["weights"] == "random":
        raise Refusal("random weights have nothing to say: mode=chat needs model.weights=pretrained")
    _check_graph(config)
    if config["mode"] == "serve":
        _check_serve(config)
    check_synthetic(config, "questions")
    if config["mode"] == "bench" and config["questions"]["source"] != SYNTHETIC:
        questions_of(config["questions"], config["limit"])


def _check_names(config: Mapping[str, Any]) -> None:
    """Askers and the chat choose the base and its adapters by name, and PEFT keeps adapters by theirs."""
    base, first = config["model"]["name"], Path(config["adapter_path"] or "").name
    if config["mode"] == "serve" and config["adapter_path"] and first in ("", base):
        raise Refusal(f"adapter_path={config['adapter_path']} has the name of no adapter: give a folder with one")
    for name in config["adapters"]:
        if not isinstance(name, str) or "." in name:
            raise Refusal(f"adapters: {name} cannot be an adapter's name: give one with letters and no dot")
        if name in (base, first, "default", "none"):
            raise Refusal(f"adapters: {name} is taken: give it another name")


def _check_graph(config: Mapping[str, Any]) -> None:
    kernels, device = config["engine"].get("kernels", "auto"), config["gpu"]["device"]
    if kernels not in ("auto", "triton", "torch"):
        raise Refusal(f"engine.kernels={kernels} is unknown: choose auto, triton or torch")
    if kernels == "triton" and (device == "cpu" or importlib.util.find_spec("triton") is None):
        lacks = "a GPU" if device == "cpu" else "Triton (pip install triton)"
        raise Refusal(f"engine.kernels=triton needs {lacks}: use engine.kernels=torch")
    pages = config["engine"].get("pages")
    if pages is not None and not is_whole(pages):
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
    if serve["api_key"] is not None and (not serve["api_key"] or not isinstance(serve["api_key"], str)):
        raise Refusal("serve.api_key is empty or a number: give one with letters, or null for none")
    if serve["context"] is not None and not is_whole(serve["context"]):
        raise Refusal(f"serve.context={serve['context']} is no whole number from 1 on: give at least 1, or null")
    if not is_whole(serve["queue"]):
        raise Refusal(f"serve.queue={serve['queue']} is no whole number from 1 on: give at least 1")
    if not is_whole(serve["port"]) or serve["port"] > LAST_PORT:
        raise Refusal(f"serve.port={serve['port']} is no port: give one from 1 to {LAST_PORT}")
    # A file that the user named says itself what it knows, to llama.cpp.
    longest = None if config["quant"].get("path") else source.shape(model).get("max_position_embeddings")
    if longest and serve["context"] and serve["context"] > longest:
        hint = f"give {longest} or null"
        raise Refusal(f"serve.context={serve['context']} is longer than {config['model']['name']} knows: {hint}")
    try:
        family = socket.AF_INET6 if ":" in serve["host"] else socket.AF_INET
        with socket.create_server((serve["host"], serve["port"]), family=family):
            pass
    except OSError as error:
        raise Refusal(f"serve.port={serve['port']} cannot be had ({error.strerror}): give another") from None
