"""What libraries say while they are imported reaches the log and not the terminal."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import logging, sys, warnings
from llm_at_home.tasks import logs
logs.set_up(logging.FileHandler(sys.argv[1]))
import torchao
warnings.warn("of a library")
logging.getLogger("llm_at_home").warning("of this package")
"""


def test_libraries_speak_to_the_log_and_this_package_to_the_terminal_too(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "job.log")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == "of this package\n"
    log = (tmp_path / "job.log").read_text()
    assert "WARNING torchao" in log, "torchao no longer warns at import: PYTREE and this test may go"
    assert "WARNING torch.utils._pytree" in log
    assert "of a library" in log
    assert "of this package" in log
