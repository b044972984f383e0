"""How long a command takes to answer when it loads no model: help, configuration, a refusal.

    python benchmarks/startup.py            prints a table and writes results/<machine>/startup/startup.json

The limit that this project sets itself is two seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from llm_at_home.records.provenance import collect

ROOT = Path(__file__).resolve().parent.parent
LIMIT_SECONDS = 2.0
COMMANDS = {
    "train.py --help": ["train.py", "--help"],
    "train.py --cfg job": ["train.py", "--cfg", "job"],
    "train.py adapter=unknown": ["train.py", "adapter=unknown"],
    "train.py quant=int8 adapter=full": ["train.py", "quant=int8", "adapter=full"],
    "evaluate.py judge=gpt4 (no answers)": ["evaluate.py", "judge=gpt4"],
}


def seconds(words: list[str], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=False)
        times.append(time.perf_counter() - start)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--machine", default="two_core_cpu", help="folder below results/")
    arguments = parser.parse_args()
    rows = []
    for name, words in COMMANDS.items():
        times = seconds(words, arguments.repeats)
        rows.append(
            {
                "command": name,
                "median": round(statistics.median(times), 3),
                "slowest": round(max(times), 3),
                "unit": "s",
                "n": len(times),
                "goal": LIMIT_SECONDS,
            }
        )
        print(f"{name:40} median {rows[-1]['median']:.2f} s, slowest {rows[-1]['slowest']:.2f} s")
    out = ROOT / "results" / arguments.machine / "startup" / "startup.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"rows": rows, "provenance": collect()}, indent=1) + "\n")
    return 0 if all(row["median"] < LIMIT_SECONDS for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
