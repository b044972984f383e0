"""What the meters cost and how far they can be trusted, on a GPU.

    python benchmarks/meters.py --out results/<machine>/meters/meters.json

Peak memory of a known allocation by all four names; both energy methods over load and over idle; and the speed of one
decode-like load with the meters on and off, in turn. It takes under two minutes and prints one table.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from llm_at_home.hardware.present import present_gpus, torch_can_use_gpu

ALLOCATION_BYTES = 4 * 2**30
LOAD_SECONDS = 10.0
PAIRS = 15
SEGMENT_SECONDS = 0.9
LAYERS, WIDTH = 32, 4096

Row = dict[str, Any]


def row(name: str, value: float | None, unit: str, note: str = "", interval: tuple[float, float] | None = None) -> Row:
    return {"name": name, "value": value, "unit": unit, "interval95": interval, "note": note}


def memory_rows() -> list[Row]:
    """By how much each name's peak rises when a tensor of a known size is made and let go."""
    import torch

    from llm_at_home.metering.memory import DRIVER_FIGURES, TORCH_PEAKS, MemoryMeter

    torch.cuda.empty_cache()
    with MemoryMeter("cuda") as meter:
        time.sleep(0.5)
        before = meter.readings()
        meter.begin_measured()
        tensor = torch.empty(ALLOCATION_BYTES, dtype=torch.uint8, device="cuda").fill_(1)
        torch.cuda.synchronize()
        time.sleep(0.5)  # many samples' time
        del tensor
        torch.cuda.empty_cache()
        after = meter.readings()
    rows = [row("allocation", ALLOCATION_BYTES / 1e9, "GB", "what was asked for")]
    for name in (*TORCH_PEAKS, *DRIVER_FIGURES):
        peak, start = after[f"measured_{name}"], before[name]
        if peak.value is None or start.value is None:
            rows.append(row(f"rise of {name}", None, "GB", peak.reason or start.reason or ""))
        else:
            note = f"from {start.value:.3f} to {peak.value:.3f}, {peak.method}"
            rows.append(row(f"rise of {name}", peak.value - start.value, "GB", note))
    return rows


class Decode:
    """A load like decoding: a matrix times a vector, layer after layer, and a wait for the host at every step."""

    def __init__(self) -> None:
        import torch

        options: dict[str, Any] = {"dtype": torch.float16, "device": "cuda"}
        self.layers = [torch.randn(WIDTH, WIDTH, **options) / WIDTH**0.5 for _ in range(LAYERS)]
        self.start = torch.randn(WIDTH, 1, **options)

    def step(self) -> float:
        """One token: a figure from the last layer, on the host."""
        x = self.start
        for layer in self.layers:
            x = layer @ x
        return float(x[0, 0])

    def seconds(self, steps: int) -> float:
        """How long so many steps take."""
        begin = time.perf_counter()
        for _ in range(steps):
            self.step()
        return time.perf_counter() - begin

    def run_for(self, seconds: float) -> int:
        """Steps for about so long; their number."""
        begin, steps = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            self.step()
            steps += 1
        return steps


def energy_rows(load: Decode) -> list[Row]:
    """Both methods over the same load, and over the same idle time."""
    from llm_at_home.metering.energy import EnergyMeter

    rows = []
    for name in ("load", "idle"):
        with EnergyMeter("cuda", idle_seconds=5.0) as meter:
            if name == "load":
                meter.measure_idle()
            else:
                time.sleep(3.0)  # until the load has left the average
            begin = time.perf_counter()
            meter.start()
            steps = load.run_for(LOAD_SECONDS) if name == "load" else 1
            time.sleep(LOAD_SECONDS if name == "idle" else 0)
            meter.stop()
            seconds = time.perf_counter() - begin
            readings, flags = meter.readings("step", steps), meter.flags
        for key, reading in readings.items():
            if name == "idle" and ("per_step" in key or key in ("energy_net", "idle_power")):
                continue
            note = f"{reading.method}, {seconds:.1f} s" if reading.value is not None else reading.reason or ""
            rows.append(row(f"{name}: {key}", reading.value, reading.unit, note))
        gross = readings["energy_gross"].value
        if gross is not None:
            rows.append(row(f"{name}: mean power", gross * 3600 / seconds, "W", readings["energy_gross"].method))
        rows += [row(f"{name}: flag", None, "", flag) for flag in flags]
    return rows


def overhead_rows(load: Decode) -> list[Row]:
    """The same number of steps with the meters on and off, in the order on off off on, so that drifts cancel."""
    from llm_at_home.metering.energy import EnergyMeter
    from llm_at_home.metering.memory import MemoryMeter
    from llm_at_home.metering.timing import mean_interval95

    load.run_for(1.0)
    steps = load.run_for(SEGMENT_SECONDS)
    with MemoryMeter("cuda") as memory, EnergyMeter("cuda") as energy:
        sampler = energy._sampler
        if sampler is not None:
            sampler.wait_until_calibrated()
        answer = sampler.read() if sampler is not None else None
        if sampler is None or sampler.process is None or answer is None:
            return [row("time added by the meters", None, "%", "no sampler runs here")]
        memory.begin_measured()
        energy.start()
        ratios = []
        for pair in range(PAIRS):
            times = {}
            for on in (True, False) if pair % 2 == 0 else (False, True):
                # A stopped process takes no sample: nothing of the meters runs then.
                sampler.process.send_signal(signal.SIGCONT if on else signal.SIGSTOP)
                load.run_for(0.05)
                times[on] = load.seconds(steps)
            ratios.append(times[True] / times[False] - 1)
        sampler.process.send_signal(signal.SIGCONT)
        energy.stop()
    mean, interval = sum(ratios) / len(ratios), mean_interval95(ratios)
    period = answer["period"]
    found = "half of it is the sampling interval" if period else "no change seen in two seconds"
    return [
        row("update period of the power sensor", period and period * 1000, "ms", found),
        row("sampling interval", answer["interval"] * 1000, "ms"),
        row("time added by the meters", mean * 100, "%", f"{PAIRS} pairs of {steps} steps", _percent(interval)),
    ]


def _percent(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    return (interval[0] * 100, interval[1] * 100) if interval else None


def show(rows: list[Row]) -> None:
    for one in rows:
        value = "unknown" if one["value"] is None else f"{one['value']:.4g}"
        interval = "" if one["interval95"] is None else "[{:.3g}, {:.3g}] ".format(*one["interval95"])
        print(f"{one['name']:36} {value:>10} {one['unit']:7} {interval}{one['note']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    arguments = parser.parse_args()
    if not present_gpus() or not torch_can_use_gpu():
        print("benchmarks/meters.py measures GPU meters: it needs an NVIDIA GPU and a CUDA build of torch")
        return 2

    import torch

    from llm_at_home.records.provenance import collect

    begin = time.perf_counter()
    with torch.inference_mode():
        torch.zeros(1, device="cuda")  # the context is alive from here on
        rows = memory_rows()
        load = Decode()
        load.run_for(0.5)
        rows += energy_rows(load)
        rows += overhead_rows(load)
    rows.append(row("the whole benchmark", time.perf_counter() - begin, "s"))
    show(rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"rows": rows, "provenance": collect()}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
