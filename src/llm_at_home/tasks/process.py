"""Runs a job's child process to its end, whatever that end is, and says how it came."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from llm_at_home.metering.memory import oom_kills

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Ending:
    """How a child process ended.

    Args:
        code: its exit code; negative is the signal that killed it.
        asked: ``interrupted`` or ``timed_out`` where this process ended it, else None.
        resident_peak: the largest resident set seen, in GB of 10^9 bytes; None where the kernel does not tell.
        oom_killed: whether the kernel's out-of-memory killer took it.
    """

    code: int
    asked: str | None
    resident_peak: float | None
    oom_killed: bool

    def __str__(self) -> str:
        if self.oom_killed:
            return "was killed by the kernel's out-of-memory killer"
        if self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}"
        return f"ended with exit code {self.code}"


class Child:
    """One child process in a session of its own, so that it and all it started can be ended together.

    Ctrl-C and SIGTERM are passed on to it once, with ``grace_s`` seconds to put its work in order; a second one, or the
    end of the grace period, kills it and its children.

    Args:
        command: the words of the command.
        environment: added to this process's.
        timeout_s: seconds after which it is asked to stop; None is never.
        grace_s: seconds from being asked to being killed.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], timeout_s: float | None, grace_s: float
    ) -> None:
        self.command = command
        self.environment = {**os.environ, **environment}
        self.timeout_s = timeout_s
        self.grace_s = grace_s
        self._process: subprocess.Popen[bytes] | None = None
        self._asked: str | None = None
        self._deadline: float | None = None
        self._resident_kilobytes = 0

    def run(self) -> Ending:
        """Start it, wait for it, and leave nothing of it behind."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        handled = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
        previous = {number: signal.signal(number, self._on_signal) for number in handled}
        kills = oom_kills()
        try:
            self._process = subprocess.Popen(self.command, env=self.environment, start_new_session=True)
            self._wait(self._process)
            code = self._process.returncode
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._signal(signal.SIGKILL)  # whatever the child left behind
        oom_killed = code == -signal.SIGKILL and self._asked is None and oom_kills() > kills
        peak = self._resident_kilobytes * 1024 / 1e9 if self._resident_kilobytes else None
        return Ending(code, self._asked, peak, oom_killed)

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        limit = time.monotonic() + self.timeout_s if self.timeout_s else None
        while process.poll() is None:
            self._resident_kilobytes = max(self._resident_kilobytes, _high_water_mark(process.pid))
            if limit is not None and self._asked is None and time.monotonic() > limit:
                self._ask("timed_out", signal.SIGTERM)
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._signal(signal.SIGKILL)
            time.sleep(POLL_SECONDS)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked is None:
            self._ask("interrupted", number)
        else:
            self._signal(signal.SIGKILL)

    def _ask(self, why: str, number: int) -> None:
        self._asked = why
        self._deadline = time.monotonic() + self.grace_s
        self._signal(number)

    def _signal(self, number: int) -> None:
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            return


def _high_water_mark(pid: int) -> int:
    """The largest resident set of a process so far, in KiB; 0 where it cannot be read."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0
