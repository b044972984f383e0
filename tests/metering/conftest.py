"""The fake driver, which tests/hardware uses too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fake_nvml import driver

__all__ = ["driver"]
