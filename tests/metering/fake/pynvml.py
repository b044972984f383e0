"""A stand-in for ``pynvml`` that behaves as NVIDIA documents: counted initialisation, units, errors by code, MIG.

The machine is :data:`GPUS` (a list of plain objects, ``fake_nvml.FakeGpu``) or, in another process, the JSON file that
``FAKE_NVML_STATE`` names, which is read again whenever it changes. What varies does so as a function of the machine's
monotonic clock, so that two processes see the same.
"""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace
from typing import Any

GPUS: list[Any] | None = None
DRIVER = True

CODES = {
    "UNINITIALIZED": (1, "Uninitialized"),
    "INVALID_ARGUMENT": (2, "Invalid Argument"),
    "NOT_SUPPORTED": (3, "Not Supported"),
    "NO_PERMISSION": (4, "Insufficient Permissions"),
    "NOT_FOUND": (6, "Not Found"),
    "LIBRARY_NOT_FOUND": (12, "NVML Shared Library Not Found"),
    "GPU_IS_LOST": (15, "GPU is lost"),
    "UNKNOWN": (999, "Unknown Error"),
}
_TEXTS = dict(CODES.values())


class NVMLError(Exception):
    """Made with a code; ``NVMLError(3)`` is an ``NVMLError_NotSupported``, as in the real module."""

    classes: dict[int, type[NVMLError]] = {}  # noqa: RUF012

    def __new__(cls, value: int = 999) -> NVMLError:
        error = Exception.__new__(NVMLError.classes.get(value, cls) if cls is NVMLError else cls)
        error.value = value
        return error

    def __str__(self) -> str:
        return _TEXTS.get(self.value, f"NVML Error with code {self.value}")


for _name, (_code, _) in CODES.items():
    globals()[f"NVML_ERROR_{_name}"] = _code
    _class = type("NVMLError_" + _name.title().replace("_", ""), (NVMLError,), {})
    NVMLError.classes[_code] = globals()[_class.__name__] = _class

_initialised = 0
_loaded: tuple[Any, list[Any]] = (None, [])


class Handle:
    """Opaque, as the real one; ``mig`` is the place of a slice on its card."""

    def __init__(self, index: int, mig: int | None = None) -> None:
        self.index, self.mig = index, mig


def _gpus() -> list[Any]:
    global _loaded
    if GPUS is not None:
        return GPUS
    path = os.environ["FAKE_NVML_STATE"]
    stamp = os.stat(path).st_mtime_ns
    if _loaded[0] != stamp:
        with open(path) as file:
            _loaded = (stamp, [_object(gpu) for gpu in json.load(file)])
    return _loaded[1]


def _object(value: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(**{**value, "mig": [SimpleNamespace(**one) for one in value["mig"]]})


def _card(handle: Handle) -> Any:
    return _gpus()[handle.index]


def _part(handle: Handle) -> Any:
    """The slice that the handle stands for, or the card."""
    return _card(handle) if handle.mig is None else _card(handle).mig[handle.mig]


def _checked(function: Any) -> Any:
    """A function that needs the driver, and that a test may make fail (``gpu.errors``)."""

    def call(*arguments: Any) -> Any:
        if not _initialised:
            raise NVMLError(CODES["UNINITIALIZED"][0])
        if arguments and isinstance(arguments[0], Handle):
            code = _card(arguments[0]).errors.get(function.__name__)
            if code:
                raise NVMLError(code)
        return function(*arguments)

    return call


def _supported(value: Any) -> Any:
    if value is None:
        raise NVMLError(CODES["NOT_SUPPORTED"][0])
    return value


def _whole_card(handle: Handle) -> Any:
    """Power and energy belong to the card: a slice's handle is refused."""
    _supported(None if handle.mig is not None else 1)
    return _card(handle)


def nvmlInit() -> None:
    global _initialised
    if not DRIVER:
        raise NVMLError(CODES["LIBRARY_NOT_FOUND"][0])
    _initialised += 1


def nvmlShutdown() -> None:
    global _initialised
    if not _initialised:
        raise NVMLError(CODES["UNINITIALIZED"][0])
    _initialised -= 1


@_checked
def nvmlDeviceGetCount() -> int:
    return len(_gpus())


@_checked
def nvmlSystemGetDriverVersion() -> str:
    return "580.65.06"


@_checked
def nvmlDeviceGetHandleByIndex(index: int) -> Handle:
    if not 0 <= index < len(_gpus()):
        raise NVMLError(CODES["INVALID_ARGUMENT"][0])
    return Handle(index)


@_checked
def nvmlDeviceGetHandleByUUID(uuid: str | bytes) -> Handle:
    text = uuid.decode() if isinstance(uuid, bytes) else uuid
    for index, gpu in enumerate(_gpus()):
        if gpu.uuid == text:
            return Handle(index)
        for place, part in enumerate(gpu.mig):
            if part.uuid == text:
                return Handle(index, place)
    raise NVMLError(CODES["NOT_FOUND"][0])


@_checked
def nvmlDeviceGetName(handle: Handle) -> str:
    name = _card(handle).name
    return name if handle.mig is None else f"{name} MIG {_part(handle).profile}"


@_checked
def nvmlDeviceGetUUID(handle: Handle) -> str:
    return _part(handle).uuid


@_checked
def nvmlDeviceGetCudaComputeCapability(handle: Handle) -> tuple[int, int]:
    return tuple(_card(handle).capability)


@_checked
def nvmlDeviceGetEnforcedPowerLimit(handle: Handle) -> int:
    return _supported(_whole_card(handle).power_limit_mw)


@_checked
def nvmlDeviceGetMemoryInfo(handle: Handle) -> SimpleNamespace:
    part = _part(handle)
    return SimpleNamespace(total=part.memory_bytes, used=part.used_bytes, free=part.memory_bytes - part.used_bytes)


@_checked
def nvmlDeviceGetComputeRunningProcesses(handle: Handle) -> list[SimpleNamespace]:
    """On a card in MIG mode the processes of all slices; on a slice's handle its own."""
    part = _part(handle)
    entries = list(part.processes)
    if handle.mig is None:
        entries += [entry for one in part.mig for entry in one.processes]
    return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in entries]


@_checked
def nvmlDeviceGetPowerUsage(handle: Handle) -> int:
    """Milliwatts, renewed every ``update_seconds``; averaged over the last ``average_seconds`` where the card does."""
    card = _whole_card(handle)
    _supported(card.power_mw)
    if not card.power_steps:
        return card.power_mw
    now = time.monotonic()
    now -= now % card.update_seconds
    if not card.average_seconds:
        return round(_at(card.power_steps, now) * 1000) + _flicker(now, card)
    energy = _integral(card.power_steps, now) - _integral(card.power_steps, now - card.average_seconds)
    return round(energy / card.average_seconds * 1000) + _flicker(now, card)


@_checked
def nvmlDeviceGetTotalEnergyConsumption(handle: Handle) -> int:
    """Millijoules since the driver was loaded, renewed every ``update_seconds``."""
    card = _whole_card(handle)
    _supported(card.energy_mj)
    if not card.power_steps or not card.counter_moves:
        return card.energy_mj
    now = time.monotonic()
    return card.energy_mj + round(_integral(card.power_steps, now - now % card.update_seconds) * 1000)


@_checked
def nvmlDeviceGetMigMode(handle: Handle) -> list[int]:
    card = _whole_card(handle)
    _supported(1 if tuple(card.capability) >= (8, 0) else None)
    return [int(bool(card.mig))] * 2


@_checked
def nvmlDeviceGetMaxMigDeviceCount(handle: Handle) -> int:
    return 7 if _card(handle).mig else 0


@_checked
def nvmlDeviceGetMigDeviceHandleByIndex(handle: Handle, index: int) -> Handle:
    if not 0 <= index < len(_card(handle).mig):
        raise NVMLError(CODES["NOT_FOUND"][0])
    return Handle(handle.index, index)


@_checked
def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle: Handle) -> Handle:
    return Handle(handle.index)


@_checked
def nvmlDeviceIsMigDeviceHandle(handle: Handle) -> int:
    return int(handle.mig is not None)


def _at(steps: list[Any], now: float) -> Any:
    """The value of the last step that has begun; before the first one, the first one's."""
    value = steps[0][1]
    for begin, level in steps:
        if begin <= now:
            value = level
    return value


def _integral(steps: list[Any], now: float) -> float:
    """From the first step to ``now``; negative before it, at the first one's level."""
    total = min(0.0, now - steps[0][0]) * steps[0][1]
    ends = [begin for begin, _ in steps[1:]] + [float("inf")]
    for (begin, level), end in zip(steps, ends, strict=True):
        total += max(0.0, min(now, end) - begin) * level
    return total


def _flicker(now: float, card: Any) -> int:
    """A sensor never gives the same milliwatt twice running: that is how its update period can be seen."""
    return round(now / card.update_seconds) % 2
