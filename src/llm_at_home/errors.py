"""The ways in which a job ends early on purpose."""

import os


class Refusal(Exception):
    """A combination or an input that cannot work; the message says in one line what to change. Exit code 2."""


class Interrupted(Exception):
    """The job was asked to stop (Ctrl-C, SIGTERM) and has put its work in order first."""


def full_traceback() -> bool:
    """Whether the environment asks for tracebacks where a person gets one line (``HYDRA_FULL_ERROR=1``)."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"
