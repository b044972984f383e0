"""The fake driver of tests/metering, and this folder's additions to it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "metering"))

from fake_nvml import driver

__all__ = ["driver"]
