"""Sends to the log what GPTQModel, and PEFT that imports it, print to the terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator

log = logging.getLogger("gptqmodel")


class _ToLog(io.TextIOBase):
    """A stream whose lines go to the log."""

    def write(self, text: str) -> int:
        """Log each line that is not empty."""
        for line in text.replace("\r", "\n").splitlines():
            if line.strip():
                log.info(line.rstrip())
        return len(text)


@contextlib.contextmanager
def library_output() -> Iterator[None]:
    """Send to the log what GPTQModel prints to the terminal; import it within, for its banner."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(os.cpu_count() or 1))
    with contextlib.redirect_stdout(_ToLog()):
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        disable_progress_bars()
        yield
