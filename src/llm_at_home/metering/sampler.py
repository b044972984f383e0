"""The sampler: a process of its own that watches power and memory, so that the measured one spends nothing on it.

    python -m llm_at_home.metering.sampler --parent PID --pid PID --gpu GPU-UUID

It imports the standard library and ``pynvml`` alone, reads requests as JSON lines from stdin and answers on stdout:

    {"do": "mark", "name": "x"}    a window named x begins now (again)
    {"do": "drop", "name": "x"}    nobody will ask for it any more
    {"do": "read"}                 nothing but the answer

Each answer follows a sample taken for it, so that the edges of a phase are where the caller stands. The process ends
when stdin closes or the parent is gone. :mod:`llm_at_home.metering.session` is the other end of the pipes.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

POLL_SECONDS = 0.001  # while the driver's update period is being found
POLL_AT_MOST_SECONDS = 2.0
ENOUGH_CHANGES = 16  # 15 intervals, whose median bears a value that happened to stay the same now and then
FEWEST_CHANGES = 3
INTERVAL_BOUNDS = (0.005, 0.5)
DEFAULT_INTERVAL = 0.05  # where the period is not found: half of the 100 ms that most cards since Volta have
MIG_HAS_NO_POWER = "the counter covers the whole card, not the MIG slice"


class Window:
    """Peaks (bytes), samples and the longest gap between two (s) since a mark; None for a peak never seen."""

    def __init__(self) -> None:
        self.device: int | None = None
        self.process: int | None = None
        self.samples = 0
        self.longest_gap = 0.0

    def add(self, device: int | None, process: int | None) -> None:
        """Take one sample of memory in."""
        self.device = _larger(self.device, device)
        self.process = _larger(self.process, process)


class Sampler:
    """Samples the GPUs ``uuids`` and, on them, the processes that the driver may know under one of ``pids``.

    Energy is the running sum of trapezoids between samples of power, in joules since this object was made.
    """

    def __init__(self, nvml: Any, uuids: Sequence[str], pids: Iterable[int]) -> None:
        self.nvml, self.pids = nvml, set(pids)
        nvml.nvmlInit()
        self.handles = [nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        self.windows: dict[str, Window] = {}
        self.period: float | None = None
        self.interval = DEFAULT_INTERVAL
        self.why_no_power = MIG_HAS_NO_POWER if any(uuid.startswith("MIG-") for uuid in uuids) else ""
        self.why_no_device = self.why_no_process = ""
        self.device: int | None = None
        self.process: int | None = None
        self.joules = 0.0
        self.begun = time.monotonic()
        self._last_power: tuple[float, float] | None = None
        self._last_sample = self._last_memory = -1e9
        self._changes: list[float] = []
        self._changed_value: int | None = None
        self.sample()
        self.calibrating = not self.why_no_power

    # -- sampling

    def sample(self, memory: bool = True) -> None:
        """One sample of power, and of memory where wanted."""
        now = time.monotonic()
        gap = now - self._last_sample
        self._sample_power()
        if memory:
            self._sample_memory()
            self._last_memory = now
        for window in self.windows.values():
            if window.samples:
                window.longest_gap = max(window.longest_gap, gap)
            window.samples += 1
            if memory:
                window.add(self.device, self.process)
        self._last_sample = now

    def tick(self) -> None:
        """What is due now: a plain sample or, at first, a quick look at the power for its update period."""
        if not self.calibrating:
            self.sample()
            return
        now = time.monotonic()
        self.sample(memory=now - self._last_memory >= DEFAULT_INTERVAL)
        if len(self._changes) >= ENOUGH_CHANGES or now - self.begun >= POLL_AT_MOST_SECONDS or self.why_no_power:
            self._finish_calibrating()

    def wait(self) -> float:
        """Seconds until the next sample is due."""
        step = POLL_SECONDS if self.calibrating else self.interval
        return max(0.0, self._last_sample + step - time.monotonic())

    def _finish_calibrating(self) -> None:
        self.calibrating = False
        if len(self._changes) >= FEWEST_CHANGES:
            gaps = [later - earlier for earlier, later in zip(self._changes, self._changes[1:], strict=False)]
            self.period = statistics.median(gaps)
            self.interval = min(max(self.period / 2, INTERVAL_BOUNDS[0]), INTERVAL_BOUNDS[1])

    def _sample_power(self) -> None:
        if self.why_no_power:
            return
        try:
            milliwatts = [self.nvml.nvmlDeviceGetPowerUsage(handle) for handle in self.handles]
        except self.nvml.NVMLError as error:
            self.why_no_power = f"the driver gives no power ({error})"
            return
        now, watts = time.monotonic(), sum(milliwatts) / 1000
        if self._last_power is not None:
            then, before = self._last_power
            self.joules += (now - then) * (watts + before) / 2
        self._last_power = (now, watts)
        # Of several cards the first is watched: the changes of all of them together would look like a shorter period.
        if self._changed_value not in (None, milliwatts[0]):
            self._changes.append(now)
        self._changed_value = milliwatts[0]
        del self._changes[:-ENOUGH_CHANGES]

    def _sample_memory(self) -> None:
        if not self.why_no_device:
            try:
                self.device = sum(self.nvml.nvmlDeviceGetMemoryInfo(handle).used for handle in self.handles)
            except self.nvml.NVMLError as error:
                self.device, self.why_no_device = None, f"the driver gives no memory in use ({error})"
        try:
            entries = [e for h in self.handles for e in self.nvml.nvmlDeviceGetComputeRunningProcesses(h)]
        except self.nvml.NVMLError as error:
            self.process, self.why_no_process = None, f"the driver lists no processes ({error})"
            return
        mine = [entry.usedGpuMemory for entry in entries if entry.pid in self.pids]
        # Some drivers list a container's process under its own id and then give no figure for it, or 0 bytes.
        if mine and all(mine):
            self.process, self.why_no_process = sum(mine), ""
            return
        self.process = None
        if mine:
            self.why_no_process = "the driver lists this process without a figure for its memory"
        elif entries:
            self.why_no_process = (
                f"the driver lists {len(entries)} process(es) and none under an id of this one "
                "(in a container it lists the host's ids)"
            )
        else:
            self.why_no_process = "the driver lists no process at all (usual inside a container)"

    # -- answering

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Sample, do what is asked, and tell everything that is known."""
        name = request.get("name", "")
        if request["do"] == "mark":
            self.windows[name] = Window()
        self.sample()
        if request["do"] == "drop":
            self.windows.pop(name, None)
        return {
            "id": request.get("id"),
            "clock": self._last_power[0] if self._last_power else self._last_sample,
            "joules": None if self.why_no_power else self.joules,
            "calibrating": self.calibrating,
            "period": self.period,
            "interval": self.interval,
            "why_no_power": self.why_no_power,
            "why_no_device": self.why_no_device,
            "why_no_process": self.why_no_process,
            "windows": {key: vars(window) for key, window in self.windows.items()},
        }


def _larger(peak: int | None, value: int | None) -> int | None:
    return value if peak is None else peak if value is None else max(peak, value)


def serve(sampler: Sampler, parent: int) -> None:
    """Sample and answer until stdin closes or the parent is another; a fork of it may hold stdin open."""
    waiting = b""
    while os.getppid() == parent:
        if select.select([sys.stdin.fileno()], [], [], sampler.wait())[0]:
            received = os.read(sys.stdin.fileno(), 65536)
            if not received:
                return
            *lines, waiting = (waiting + received).split(b"\n")
            for line in lines:
                _say(sampler.answer(json.loads(line)))
        if sampler.wait() <= 0:
            sampler.tick()


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """Run the process; an error that ends it is its last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", type=int, required=True, help="the process that this one may not outlive")
    parser.add_argument("--pid", type=int, action="append", required=True, help="an id of the process to watch")
    parser.add_argument("--gpu", action="append", required=True, help="UUID of a GPU or of a MIG slice")
    options = parser.parse_args(arguments)
    # A signal to the whole group is meant for the job, which will still ask for its peaks: it decides when to end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        import pynvml

        serve(Sampler(pynvml, options.gpu, options.pid), options.parent)
    except BrokenPipeError:
        os._exit(0)  # the interpreter's own flush at its end would fail the same way
    except Exception as error:
        _say({"fatal": f"{type(error).__name__}: {error}"})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
