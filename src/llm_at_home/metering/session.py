"""The meters' end of the sampler: which GPUs a job uses, and one sampler process for all meters of this process."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

START_SECONDS = 30.0  # the first initialisation of the driver on a machine of eight GPUs takes many seconds
ANSWER_SECONDS = 10.0
CALIBRATION_SECONDS = 3.0

_shared: dict[tuple[str, ...], SamplerSession] = {}
_shared_lock = threading.Lock()


def used_gpus(count: int = 1) -> list[Any]:
    """The GPUs that a job of ``count`` devices runs on: the first visible ones (:class:`hardware.present.Gpu`)."""
    from llm_at_home.hardware.present import present_gpus

    return list(present_gpus()[:count])


def is_mig(gpu: Any) -> bool:
    """Whether this entry is a MIG slice of a card."""
    return bool(getattr(gpu, "mig", False)) or gpu.uuid.startswith("MIG-")


def own_process_ids() -> list[int]:
    """The ids of this process in every process namespace that it can see (``NSpid``), its own among them."""
    ids = {os.getpid()}
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                ids |= {int(word) for word in line.split()[1:]}
    except (OSError, ValueError):
        pass
    return sorted(ids)


class SamplerSession:
    """A running sampler process. When it fails, :attr:`problem` says how, and answers are None; it never raises.

    Args:
        uuids: of the GPUs or MIG slices to watch.
    """

    def __init__(self, uuids: Sequence[str]) -> None:
        self.problem = ""
        self.users = 0
        self._lock = threading.Lock()
        self._buffer = b""
        self._requests = 0
        self._answered = False
        words = [sys.executable, "-P", "-m", "llm_at_home.metering.sampler", "--parent", str(os.getpid())]
        words += [word for pid in own_process_ids() for word in ("--pid", str(pid))]
        words += [word for uuid in uuids for word in ("--gpu", uuid)]
        # Last on the path, so that the package is found where it was not installed and nothing else changes its place.
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), root)))
        try:
            self.process: subprocess.Popen[bytes] | None = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env={**os.environ, "PYTHONPATH": path},
            )
        except OSError as error:
            self.process, self.problem = None, f"the sampler could not be started ({error})"

    def mark(self, name: str) -> dict[str, Any] | None:
        """Begin the window ``name``; the answer as :meth:`read`'s."""
        return self._ask({"do": "mark", "name": name})

    def drop(self, name: str) -> None:
        """Forget the window ``name``."""
        self._ask({"do": "drop", "name": name})

    def read(self) -> dict[str, Any] | None:
        """A sample taken now and all windows (:meth:`metering.sampler.Sampler.answer`); None after a failure."""
        return self._ask({"do": "read"})

    def wait_until_calibrated(self) -> None:
        """Wait until the driver's update period has been looked for, which is done in two seconds at most."""
        deadline = time.monotonic() + CALIBRATION_SECONDS
        while time.monotonic() < deadline:
            answer = self.read()
            if answer is None or not answer["calibrating"]:
                return
            time.sleep(0.05)

    def close(self) -> None:
        """End the process; a second time does nothing."""
        with self._lock:
            self._end("the sampler was closed")

    def _ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        with self._lock:
            if self.problem or self.process is None or self.process.stdin is None:
                return None
            try:
                self._requests += 1
                with contextlib.suppress(BrokenPipeError):  # how the process ended is in its other pipe
                    self.process.stdin.write(json.dumps(request | {"id": self._requests}).encode() + b"\n")
                answer = self._answer()
            except (OSError, ValueError) as error:
                self._end(f"the sampler stopped answering ({error})")
                return None
            if "fatal" in answer:
                self._end(f"the sampler failed ({answer['fatal']})")
                return None
            return answer

    def _answer(self) -> dict[str, Any]:
        """The answer to the last request; one that an interrupted call left in the pipe is passed over."""
        while True:
            answer: dict[str, Any] = json.loads(self._line(ANSWER_SECONDS if self._answered else START_SECONDS))
            self._answered = True
            if "fatal" in answer or answer["id"] == self._requests:
                return answer

    def _line(self, patience: float) -> bytes:
        assert self.process is not None
        assert self.process.stdout is not None
        deadline = time.monotonic() + patience
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise OSError(f"no answer in {patience:g} s")
            received = os.read(self.process.stdout.fileno(), 65536)
            if not received:
                raise OSError(_ending(self.process))
            self._buffer += received
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def _end(self, problem: str) -> None:
        self.problem = self.problem or problem
        process, self.process = self.process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            process.wait(timeout=2)
        except subprocess.TimeoutExpired:  # stopped, or stuck in the driver
            process.kill()
            process.wait()


def _ending(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        return "it closed its pipe"
    return f"its process was ended by signal {-code}" if code < 0 else f"its process ended with exit code {code}"


def borrow(gpus: Sequence[Any]) -> SamplerSession:
    """The sampler of these GPUs, started for the first meter and shared by the next; give it back at the end."""
    key = (str(os.getpid()), *(gpu.uuid for gpu in gpus))  # a fork must not talk through its parent's pipes
    with _shared_lock:
        session = _shared.get(key)
        if session is None or session.problem:
            session = _shared[key] = SamplerSession([gpu.uuid for gpu in gpus])
        session.users += 1
    return session


def give_back(session: SamplerSession) -> None:
    """One user less; with the last one the process ends."""
    with _shared_lock:
        session.users -= 1
        if session.users > 0:
            return
        for key in [key for key, value in _shared.items() if value is session]:
            del _shared[key]
    session.close()


@atexit.register
def _close_all() -> None:
    for key in [key for key in _shared if key[0] == str(os.getpid())]:
        _shared.pop(key).close()
