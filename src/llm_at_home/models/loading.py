"""Loads configurations, tokenizers and dense weights through transformers; its errors become one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.models.chat import ensure_chat_template
from llm_at_home.models.embedded import ensure_converted
from llm_at_home.models.source import EMBEDDED

PICKLED = ["*.bin", "*.pt", "*.pth"]


def location(model: Mapping[str, Any]) -> str:
    """The folder or hub id that transformers is to load."""
    if model["source"] == EMBEDDED:
        return str(ensure_converted())
    folder = Path(model["source"]).expanduser()
    return str(folder) if folder.is_dir() else model["source"]


def fetched(model: Mapping[str, Any]) -> str:
    """:func:`location` for a library that takes no revision: where one is named, the folder of its files.

    Raises:
        Refusal: when the hub does not give it.
    """
    place = location(model)
    if Path(place).is_dir() or model["revision"] is None:
        return place
    from huggingface_hub import snapshot_download

    with hub_errors(model["source"]):
        return str(snapshot_download(place, revision=model["revision"], ignore_patterns=PICKLED))


def load_config(model: Mapping[str, Any]) -> Any:
    """The transformers configuration, from the configuration itself where it gives an architecture."""
    from transformers import AutoConfig

    if model["weights"] == "random" and model["architecture"]:
        architecture = dict(model["architecture"])
        return AutoConfig.for_model(architecture.pop("model_type"), **architecture)
    with hub_errors(model["source"]):
        return AutoConfig.from_pretrained(
            location(model), revision=model["revision"], trust_remote_code=model["trust_remote_code"]
        )


def has_tokenizer(model: Mapping[str, Any]) -> bool:
    """Whether a tokenizer can be had: not for an architecture given without weights."""
    return not (model["weights"] == "random" and model["architecture"])


def load_tokenizer(model: Mapping[str, Any]) -> Any:
    """The tokenizer with a chat template, and with padding set (to end-of-sequence where it has none).

    Raises:
        Refusal: when it cannot be had, or has no chat template and the configuration names none.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(model):
        hint = "use questions=synthetic or data=synthetic"
        raise Refusal(f"{model['name']} with random weights has no tokenizer: {hint}")
    with hub_errors(model["source"]):
        tokenizer = AutoTokenizer.from_pretrained(
            location(model), revision=model["revision"], trust_remote_code=model["trust_remote_code"]
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    ensure_chat_template(tokenizer, model["chat_template"], model["name"])
    return tokenizer


def load_weights(model: Mapping[str, Any], dtype: str, device: str, **options: Any) -> Any:
    """The causal language model in evaluation mode, on its device.

    Args:
        model: the ``model`` group.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        device: ``cpu`` or ``cuda``.
        options: handed to ``from_pretrained`` (a quantization configuration, say); random weights take none.

    Raises:
        Refusal: when it cannot be had, or some of its weights are missing.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from llm_at_home.models import random_weights

    transformers_logging.disable_progress_bar()
    torch_dtype = getattr(torch, dtype)
    if model["weights"] == "random":
        return random_weights.build(load_config(model), torch_dtype, device)
    with hub_errors(model["source"]):
        read: Any = AutoModelForCausalLM.from_pretrained(
            location(model),
            output_loading_info=True,
            revision=model["revision"],
            trust_remote_code=model["trust_remote_code"],
            use_safetensors=model["use_safetensors"] or None,
            dtype=torch_dtype,
            device_map={"": device},
            **options,
        )
    loaded, report = read
    # transformers fills what a file lacks with random numbers, and only logs it.
    missing = sorted(report["missing_keys"])
    if missing:
        raise Refusal(
            f"{model['source']} lacks {len(missing)} of its weights, {missing[0]} the first: give another source"
        )
    return loaded.eval()


@contextmanager
def hub_errors(source: str) -> Iterator[None]:
    """Turn the hub's and transformers' ways of saying "not to be had" into one line each."""
    import safetensors
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except (OSError, HfHubHTTPError, ValueError, safetensors.SafetensorError) as error:
        chain: list[BaseException] = []
        cause: BaseException | None = error
        while cause is not None and cause not in chain:
            chain.append(cause)
            cause = cause.__cause__ or cause.__context__
        if any(isinstance(e, GatedRepoError) for e in chain):
            raise Refusal(f"{source} is gated: accept its licence on the hub, then run `hf auth login`") from error
        if any(isinstance(e, RevisionNotFoundError) for e in chain):
            raise Refusal(f"{source} has no such revision: mend model.revision") from error
        if any(isinstance(e, RepositoryNotFoundError) for e in chain):
            hint = "check model.source, or run `hf auth login`"
            raise Refusal(f"{source} is not on the hub, or is private: {hint}") from error
        offline = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)
        if any(isinstance(e, offline) or "connect" in str(e).lower() for e in chain):
            hint = "give a local folder with model.source=FOLDER"
            raise Refusal(f"{source} cannot be downloaded (no network?): {hint}") from error
        if "trust_remote_code" in str(error):
            hint = "trust it with model.trust_remote_code=true"
            raise Refusal(f"{source} brings code of its own, which would have to run: {hint}") from error
        raise Refusal(f"{source} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
