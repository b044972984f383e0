"""What a record says about its run, read defensively: any key may be missing or of another shape."""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePath
from typing import Any

from llm_at_home.pruning.naming import prune_words
from llm_at_home.quantization import naming
from llm_at_home.records.schema import Record

UNKNOWN = "unknown"
CUDA_MEMORY = ("torch_allocated_peak", "torch_reserved_peak", "process_memory_peak")
CPU_MEMORY = ("resident_set_peak",)


def clean(text: object) -> str:
    """One line of printable text: records hold other people's strings, terminals obey control characters."""
    marks = (c if unicodedata.category(c) not in ("Cc", "Cf", "Cs") else " " for c in str(text))
    return " ".join("".join(marks).split())


def at(tree: Any, *keys: str) -> Any:
    """The value under nested keys, or None wherever the path breaks off."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def name_at(tree: Any, *keys: str) -> str:
    """The text under nested keys, or "unknown"."""
    value = at(tree, *keys)
    return UNKNOWN if value is None or isinstance(value, dict | list) else clean(value) or UNKNOWN


def about(record: Record) -> Any:
    """The config that names the model: a judge's record has it only in the run that was judged."""
    return record.config if at(record.config, "model") else at(record.subject, "config") or record.config


def model(record: Record) -> str:
    """The model's name, or where it was taken from."""
    name = name_at(about(record), "model", "name")
    if name == UNKNOWN:
        name = name_at(about(record), "model", "source")
    models = at(record.subject, "models")
    if name == UNKNOWN and isinstance(models, list):
        return ", ".join(map(clean, models))
    # A judge under test is the model that its record is about.
    return name_at(record.config, "judge", "model") if name == UNKNOWN else name


def quant(record: Record) -> str:
    """The name of the quantization."""
    return name_at(about(record), "quant", "name")


def quant_words(record: Record) -> tuple[str, ...]:
    """The name of the quantization, then what tells it from others of its name: bits, group size, type, pruning."""
    group = at(about(record), "quant")
    words = naming.quant_words(group)[1:] if isinstance(group, dict) else []
    return (quant(record), *map(clean, words), *pruning(record))


def pruning(record: Record) -> tuple[str, ...]:
    """How the base was pruned, in a few words, or nothing."""
    return tuple(map(clean, prune_words(at(about(record), "prune"))))


def has_published_bits(record: Record) -> bool:
    """Whether the base has as many bits as the paper's: it quantized to four throughout."""
    return at(record.config, "quant", "bits") in (None, 4)


def has_random_weights(record: Record) -> bool:
    """Whether the model was built without weights, so that only its resource figures mean anything."""
    return at(about(record), "model", "weights") == "random"


def evaluation(record: Record) -> str:
    """What kind of evaluation an evaluate record is: judge, text, ..."""
    return name_at(record.config, "task")


def subject_hash(record: Record) -> str | None:
    """The config hash of the run that an evaluation is about."""
    value = at(record.subject, "config_hash")
    return value if isinstance(value, str) and value else None


def on_cpu(record: Record) -> bool:
    """Whether the run computed on the CPU, which decides which memory figures are defined."""
    if "cpu" in (name_at(record.config, "gpu", "name"), name_at(record.config, "gpu", "device")):
        return True
    if at(record.provenance, "gpu"):
        return False
    return not any(name in record.readings and record.readings[name].value is not None for name in CUDA_MEMORY)


def host(record: Record) -> str:
    """The processor or card that computed, by its own name."""
    if on_cpu(record):
        name = re.sub(r"\((R|TM)\)|\bCPU\b|@.*$", "", name_at(record.provenance, "cpu", "model"))
        cores = at(record.provenance, "cpu", "cores")
        name = " ".join(name.split())
        return f"{name} ({cores} cores)" if isinstance(cores, int) else name
    card = name_at(record.config, "gpu", "card")
    if card != UNKNOWN:
        return card
    gpu = at(record.provenance, "gpu")
    if isinstance(gpu, list):
        first = name_at(gpu[0], "name") if gpu else UNKNOWN
        # The list is of the cards in the machine; how many of them computed is not in it.
        return f"{first} ({len(gpu)} present)" if len(gpu) > 1 else first
    return name_at(gpu, "name")


def machine(record: Record) -> str:
    """The device, and which one of its kind: two cards of one name stand in hosts of different speed."""
    cards = at(record.provenance, "gpu")
    first = cards[0] if isinstance(cards, list) and cards else cards
    uuid = at(first, "uuid")
    # The first part of an NVML id tells cards apart and still fits a caption.
    return device(record) if on_cpu(record) or not uuid else f"{device(record)}, {clean(uuid)[:12]}"


def emulated(record: Record) -> str | None:
    """The smaller card that the run kept to, when it is another than the card that computed."""
    return name_at(record.config, "gpu", "name") if at(record.config, "gpu", "emulated") is True else None


def device(record: Record) -> str:
    """The device for a reader: the host, and the card that it stood in for."""
    card = emulated(record)
    return f"{card} on {host(record)}" if card else host(record)


def kernel(record: Record) -> str | None:
    """The linear layers that ran and their backend in a few words, or None when the record names none."""
    main = [at(record.kernel, key) for key in ("linear", "backend")]
    return _words(main) or _words(record.kernel) or None


def error_line(record: Record) -> str:
    """The first line of what went wrong."""
    error = record.error
    message = at(error, "message") or (error if not isinstance(error, dict) else None)
    first = clean(next(iter(str(message).strip().splitlines()), "")) if message else ""
    kind = at(error, "type")
    return ": ".join(part for part in (clean(kind) if kind else "", first) if part)


def path_tail(path: object) -> str:
    """The last two parts of a path: enough to know a folder by."""
    return clean("/".join(PurePath(str(path)).parts[-2:]))


def _words(value: Any) -> str:
    if isinstance(value, dict):
        parts = []
        for key, inner in value.items():
            if isinstance(inner, int) and not isinstance(inner, bool):
                parts.append(f"{_short(key)} × {inner}")
            elif words := _words(inner):
                parts.append(words)
        return ", ".join(dict.fromkeys(parts))
    if isinstance(value, list | tuple):
        return ", ".join(dict.fromkeys(words for inner in value if (words := _words(inner))))
    return "" if value is None or isinstance(value, bool) else _short(value)


def _short(name: object) -> str:
    # torch.nn.modules.linear.Linear -> Linear: the whole path is in the record. Versions keep their dots.
    text = clean(name)
    return text.rsplit(".", 1)[-1] if re.fullmatch(r"[A-Za-z_][\w]*(\.[A-Za-z_]\w*)+", text) else text
