"""Asking NVIDIA's driver (NVML): a session that may be absent, and questions that it may not answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def session() -> Iterator[Any | None]:
    """``pynvml`` while the driver is open, or None where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def ask(nvml: Any, function: str, *arguments: Any) -> Any | None:
    """The driver's answer, or None where this card, driver or binding has none."""
    call = getattr(nvml, function, None)
    if call is None:
        return None
    try:
        return call(*arguments)
    except nvml.NVMLError:
        return None


def text(value: bytes | str) -> str:
    """Older bindings give bytes."""
    return value.decode() if isinstance(value, bytes) else value


def whole_card(nvml: Any, handle: Any) -> Any:
    """The card that a MIG slice is part of; any other handle is its own card.

    A slice has memory and processes of its own, but clocks, temperature and power are the card's.
    """
    return ask(nvml, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle) or handle
