"""Reads what a ``.gguf`` file says of itself: metadata, and name, shape and type of each tensor.

The header is read with ``struct`` alone, so that the parent process can refuse a wrong file at once; the ``gguf``
package would need two seconds for a vocabulary. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.records.schema import Reading

METHOD = "tensors_on_disk"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
# struct formats of the metadata's value types; 8 is a string and 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# The embeddings and the output head, which the other methods do not count among the linear layers either.
HEAD = "output.weight"
OUTSIDE = ("token_embd.weight", HEAD)


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies. ``shape`` is torch's order: (outputs, inputs) of a linear layer."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    bytes: int

    @property
    def weights(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def is_linear(self) -> bool:
        """Whether it is one of the decoder's linear layers, or several (experts)."""
        return len(self.shape) > 1 and self.name not in OUTSIDE


class GGUFFile:
    """The header of a file.

    Args:
        path: the file.

    Raises:
        Refusal: for a file that is missing, cut off, one of several parts, or none of GGUF version 2 or 3.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise Refusal(f"there is no model file {path}")
        self.bytes = self.path.stat().st_size
        try:
            with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.metadata, self.tensors = _Header(data).read()
        except (struct.error, ValueError, KeyError, UnicodeDecodeError, OverflowError) as error:
            raise Refusal(f"{self.path} is no whole .gguf file: {error}") from error
        parts = self.metadata.get("split.count", 0)
        if parts > 1:
            hint = "join them with llama.cpp's `llama-gguf-split --merge`"
            raise Refusal(f"{self.path} is one of {parts} parts of a model: {hint}")
        end = max((tensor.offset + tensor.bytes for tensor in self.tensors), default=0)
        if end > self.bytes:
            raise Refusal(f"{self.path} is cut off: {self.bytes} bytes of {end}")

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture (``llama``, ``qwen2``, ...)."""
        return str(self.metadata.get("general.architecture", "unknown"))

    def shape(self, key: str, default: Any = None) -> Any:
        """A figure of the architecture, such as ``context_length``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def types(self, tensors: Iterator[Tensor] | None = None) -> dict[str, int]:
        """How many tensors have each type, the most frequent first; what is in the file, whatever it is called."""
        return dict(Counter(tensor.type for tensor in tensors or self.tensors).most_common())

    def linear_types(self) -> dict[str, int]:
        """The same for the decoder's linear layers alone."""
        return self.types(tensor for tensor in self.tensors if tensor.is_linear)

    def size_readings(self) -> dict[str, Reading]:
        """Bits per weight and sizes (GB) as on disk; block scales are part of a tensor and counted."""
        linear = [tensor for tensor in self.tensors if tensor.is_linear]
        total = sum(tensor.bytes for tensor in self.tensors)

        def bits(tensors: list[Tensor]) -> Reading:
            weights = sum(tensor.weights for tensor in tensors)
            return Reading(8 * sum(tensor.bytes for tensor in tensors) / weights, "bits", METHOD, n=len(tensors))

        return {
            "bits_per_weight": bits(linear),
            "bits_per_weight_whole_model": bits(self.tensors),
            "model_size": Reading(total / 1e9, "GB", METHOD),
            "checkpoint_size": Reading(self.bytes / 1e9, "GB", "file_size"),
        }

    def dequantized(self, tensor: Tensor) -> Any:
        """A tensor's values as float32 numpy array of its shape."""
        import numpy as np
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        raw = np.memmap(self.path, np.uint8, "r", tensor.offset, (tensor.bytes,))
        rows = raw.reshape(*tensor.shape[:-1], -1)
        values = dequantize(rows, GGMLQuantizationType[tensor.type])
        return np.array(values, dtype=np.float32).reshape(tensor.shape)  # a copy: the file is mapped read-only


class _Header:
    """Reads values one after the other; everything is little-endian."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def read(self) -> tuple[dict[str, Any], list[Tensor]]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        if self.data[:4] != MAGIC:
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        version, tensors, pairs = self.scalars("IQQ")
        if version not in VERSIONS:
            raise ValueError(f"GGUF version {version} is unknown")
        metadata = {}
        for _ in range(pairs):
            key = self.string()
            (kind,) = self.scalars("I")
            metadata[key] = self.value(kind)
        found = []
        for _ in range(tensors):
            name = self.string()
            (dimensions,) = self.scalars("I")
            shape = self.scalars("Q" * dimensions)[::-1]
            number, offset = self.scalars("IQ")
            kind = GGMLQuantizationType(number)
            block, size = GGML_QUANT_SIZES[kind]
            found.append((name, shape, kind.name, offset, math.prod(shape) // block * size))
        alignment = metadata.get("general.alignment", 32)
        start = -(-self.at // alignment) * alignment
        return metadata, [Tensor(name, shape, kind, start + offset, size) for name, shape, kind, offset, size in found]

    def scalars(self, formats: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + formats, self.data, self.at)
        self.at += struct.calcsize("<" + formats)
        return values

    def string(self) -> str:
        (length,) = self.scalars("Q")
        text = self.data[self.at : self.at + length]
        if len(text) < length:
            raise ValueError("it ends within its header")
        self.at += length
        return text.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item, count = self.scalars("IQ")
            if item in SCALARS:
                return list(self.scalars(f"{count}{SCALARS[item]}"))
            return [self.value(item) for _ in range(count)]
        return self.scalars(SCALARS[kind])[0]


def kernel(file: GGUFFile, build: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of the tensors that really ran: the file's types with counts, not the type that was asked for.

    Args:
        file: the model file.
        build: what is known of the library that runs it.
    """
    types = file.linear_types()
    return {
        "linear": next(iter(types), "none"),
        "layers": types,
        "other_tensors": file.types(tensor for tensor in file.tensors if not tensor.is_linear),
        "architecture": file.architecture,
        **build,
    }
