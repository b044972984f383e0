"""The GPUs that this process may use, asked of the driver (NVML) and not of torch, so that it costs milliseconds."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from llm_at_home.hardware.nvml import ask, session, text, whole_card

MIG_ENABLED = 1


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU, or one MIG slice of it, as the driver describes it.

    ``memory`` is in GB of 10^9 bytes, None where the driver keeps no account of it (memory shared with the CPU).
    A slice has its own name, UUID and memory; index, capability and power limit are those of its card.
    """

    index: int
    name: str
    uuid: str
    memory: float | None
    compute_capability: tuple[int, int]
    driver: str
    power_limit_watts: float | None
    mig: bool = False

    def describe(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return {**self.__dict__, "compute_capability": ".".join(map(str, self.compute_capability))}


@functools.cache
def present_gpus() -> tuple[Gpu, ...]:
    """The visible GPUs in CUDA's order; empty without a driver.

    ``CUDA_VISIBLE_DEVICES`` names them as indices, UUIDs or the UUIDs of MIG slices. A card in MIG mode that is named
    as a whole is its first slice, because that is all that CUDA gives a process.
    """
    # CUDA's own default puts the fastest card first: its first card would then not be the driver's.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    with session() as nvml:
        if nvml is None:
            return ()
        count = ask(nvml, "nvmlDeviceGetCount") or 0
        found = [_Card.at(nvml, index) for index in range(count)]
        # A card that has fallen off the bus does not hide the others, and the others keep their numbers.
        cards = [card for card in found if card is not None]
        return tuple(_visible(nvml, cards, os.environ.get("CUDA_VISIBLE_DEVICES")))


@dataclass(frozen=True)
class _Card:
    """A card by its own number and UUID, and what CUDA makes of it."""

    index: int
    uuid: str
    gpu: Gpu

    @classmethod
    def at(cls, nvml: Any, index: int) -> _Card | None:
        handle = ask(nvml, "nvmlDeviceGetHandleByIndex", index)
        uuid = None if handle is None else ask(nvml, "nvmlDeviceGetUUID", handle)
        mode = ask(nvml, "nvmlDeviceGetMigMode", handle)
        if mode and mode[0] == MIG_ENABLED:
            numbers = range(ask(nvml, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0)
            slices = (ask(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", handle, number) for number in numbers)
            gpu = _describe(nvml, next((each for each in slices if each is not None), None), index, mig=True)
        else:
            gpu = _describe(nvml, handle, index)
        return None if gpu is None or uuid is None else cls(index, text(uuid), gpu)


def _describe(nvml: Any, handle: Any, index: int, mig: bool = False) -> Gpu | None:
    if handle is None:
        return None
    card = whole_card(nvml, handle) if mig else handle
    name, uuid = ask(nvml, "nvmlDeviceGetName", handle), ask(nvml, "nvmlDeviceGetUUID", handle)
    capability = ask(nvml, "nvmlDeviceGetCudaComputeCapability", card)
    if name is None or uuid is None or capability is None:
        return None
    memory = ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
    limit = ask(nvml, "nvmlDeviceGetEnforcedPowerLimit", card)
    return Gpu(
        index=index,
        name=text(name),
        uuid=text(uuid),
        memory=None if memory is None else memory.total / 1e9,
        compute_capability=(int(capability[0]), int(capability[1])),
        driver=text(ask(nvml, "nvmlSystemGetDriverVersion") or "unknown"),
        power_limit_watts=None if limit is None else limit / 1000,
        mig=mig,
    )


def _visible(nvml: Any, cards: list[_Card], variable: str | None) -> list[Gpu]:
    if variable is None:
        return [card.gpu for card in cards]
    chosen: list[Gpu] = []
    for entry in filter(None, (part.strip() for part in variable.split(","))):
        gpu = _slice(nvml, entry, cards) if entry.startswith("MIG-") else _named(entry, cards)
        if gpu is None:
            break  # CUDA itself ignores everything from the first invalid or ambiguous entry on
        chosen.append(gpu)
    return chosen


def _named(entry: str, cards: list[_Card]) -> Gpu | None:
    match = [card.gpu for card in cards if entry == str(card.index) or card.uuid.startswith(entry)]
    return match[0] if len(match) == 1 else None


def _slice(nvml: Any, uuid: str, cards: list[_Card]) -> Gpu | None:
    handle = ask(nvml, "nvmlDeviceGetHandleByUUID", uuid)
    if handle is None:
        return None
    parent = ask(nvml, "nvmlDeviceGetUUID", whole_card(nvml, handle))
    match = [card for card in cards if parent is not None and card.uuid == text(parent)]
    return _describe(nvml, handle, match[0].index, mig=True) if match else None


def torch_can_use_gpu() -> bool:
    """Whether the installed torch is a CUDA build, by its version and without importing it."""
    return "+cpu" not in metadata.version("torch")
