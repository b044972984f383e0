"""An OpenAI-compatible endpoint, in this process, until Ctrl-C: our own over transformers' models, or llama.cpp's."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from llm_at_home.tasks import logs
from llm_at_home.tasks.infer import load_engine

CONTEXT = 4096  # where neither the user nor the model says less


def serve(config: Mapping[str, Any]) -> None:
    """Serve the model of a resolved configuration of ``conf/infer.yaml``; ``/v1`` of the address is the base URL.

    Args:
        config: with ``mode=serve``.

    Raises:
        Refusal: for a file that llama.cpp cannot load.
    """
    logs.set_up(logging.NullHandler())
    if config["engine"]["name"] == "llamacpp":
        _serve_file(config)
    else:
        _serve_model(config)


def _serve_model(config: Mapping[str, Any]) -> None:
    """Askers name the base, the adapter of ``adapter_path`` by its folder's name, or one of ``adapters`` by its key."""
    from llm_at_home.adapters.attach import add_saved
    from llm_at_home.generation.serving.api import Service
    from llm_at_home.generation.serving.scheduler import Scheduler
    from llm_at_home.generation.serving.server import Server

    options, engine = config["serve"], load_engine(config)
    models: dict[str, str | None] = {config["model"]["name"]: None}
    if config["adapter_path"]:
        models[Path(config["adapter_path"]).name] = engine.adapters[0]
        if engine.model.active_peft_config.is_prompt_learning:
            del models[config["model"]["name"]]  # a prompt is not switched off
    for name, path in config["adapters"].items():
        add_saved(engine.model, path, name)
        models[name] = name
    context = options["context"] or min(CONTEXT, engine.context or CONTEXT)
    with Scheduler(engine, context, options["queue"]) as scheduler:
        chosen = {} if engine.temperature is None else {"temperature": engine.temperature}
        service = Service(scheduler, models, options["api_key"], engine.max_new_tokens, **chosen)
        decoding = engine.describe().get("engine", "one answer at a time: engine=graph answers several")
        on_ready = partial(_announce, models, options, decoding)
        Server(service, options["host"], options["port"], on_ready).run()


def _serve_file(config: Mapping[str, Any]) -> None:
    """llama.cpp's own server, which batches, streams, keeps conversations and renders chat templates itself."""
    from llm_at_home.generation.llama_server import Address, LocalServer
    from llm_at_home.models.chat import template_named
    from llm_at_home.quantization import gguf

    options, engine, name = config["serve"], config["engine"], config["model"]["name"]
    server = LocalServer(
        gguf.ensure(config),
        alias=name,
        context=options["context"] or engine["context"],
        parallel=engine["batch_size"],
        threads=engine["threads"],
        on_gpu=config["gpu"]["device"] == "cuda",
        longest_reply=engine["max_new_tokens"],
        temperature=engine["temperature"],
        chat_template=template_named(config["model"]["chat_template"]),
        address=Address(options["host"], options["port"], options["api_key"]),
    )
    with server, contextlib.suppress(KeyboardInterrupt):
        _announce([name], options, f"llama.cpp, {engine['batch_size']} at once")
        while (ending := server.ending()) is None:
            continue
        raise ending


def _announce(models: Iterable[str], options: Mapping[str, Any], engine: str) -> None:
    host = f"[{options['host']}]" if ":" in options["host"] else options["host"]
    print(f"{', '.join(models)} at http://{host}:{options['port']}/v1 (Ctrl-C ends it)", flush=True)
    print(engine, flush=True)
