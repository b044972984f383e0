"""Where log lines go: everything to the job's log, and to the terminal only what this package itself warns of."""

from __future__ import annotations

import logging
import sys

LIBRARIES = ("httpx", "mlflow", "alembic")
# PyTorch's loggers write to the terminal through a handler of their own. This one speaks whenever torchao is imported,
# and transformers and PEFT import torchao whether it is used or not.
PYTREE = "torch.utils._pytree"


def set_up(log: logging.Handler) -> None:
    """Send log lines and Python's warnings to ``log``, before the libraries that write them are imported.

    Args:
        log: a job's log file, or ``logging.NullHandler()`` for a command that keeps no log.
    """
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_terminal = logging.StreamHandler(sys.stderr)
    to_terminal.setLevel(logging.WARNING)
    to_terminal.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[log], force=True)
    logging.getLogger("llm_at_home").addHandler(to_terminal)
    logging.captureWarnings(True)
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    pytree = logging.getLogger(PYTREE)
    pytree.addHandler(log)
    pytree.propagate = False
