"""Callbacks that make a training job end badly, each in its own way; ``test_endings`` puts them into real jobs."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback


class Disaster(Callback):
    """Does ``kind`` at the start of the second optimizer step.

    Args:
        kind: the name of one of the methods below.
        leave_behind: a file to write the process id of a child into that would live on by itself.
    """

    def __init__(self, kind: str, leave_behind: str | None = None) -> None:
        self.kind = kind
        self.leave_behind = leave_behind

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != 1:
            return
        if self.leave_behind:
            sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            with open(self.leave_behind, "w") as file:
                file.write(str(sleeper.pid))
        getattr(self, self.kind)()

    def nothing(self) -> None:
        """No disaster, for the jobs of a sweep that are to go well."""

    quiet = nothing

    def segfault(self) -> None:
        ctypes.string_at(0)

    def error(self) -> None:
        raise ValueError("the sky fell\nand a second line")

    def hang(self) -> None:
        import signal

        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        time.sleep(600)

    def wait(self) -> None:
        time.sleep(600)

    def address_space(self) -> None:
        import torch

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000, hard))
        torch.ones(4_000_000_000)

    def resident(self) -> None:
        blocks = []
        while True:
            blocks.append(bytearray(os.urandom(1) * 50_000_000))
