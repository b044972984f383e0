"""The fake driver, which tests/hardware uses too, and no sampler that outlives its test."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_nvml import driver

from llm_at_home.metering import session

__all__ = ["driver"]


@pytest.fixture(autouse=True)
def _no_sampler_is_left() -> Iterator[None]:
    yield
    session._close_all()
