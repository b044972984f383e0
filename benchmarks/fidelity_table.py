"""The table of docs/quantization.md from the records of ``experiment=fidelity``.

python evaluate.py -m experiment=fidelity quant=int8,nf4,nf4_nested,fp4
python evaluate.py -m experiment=fidelity quant=rtn quant.group_size=32 quant.bits=8,4,3,2
python evaluate.py experiment=fidelity quant=none dtype=bfloat16
python benchmarks/fidelity_table.py results/two_core_cpu/fidelity
"""

from __future__ import annotations

import sys
from pathlib import Path

from llm_at_home.records import store
from llm_at_home.records.schema import Reading, Record

COLUMNS = {
    "perplexity_ratio": ("perplexity ratio", 3),
    "kl_divergence_mean": ("KL divergence, mean (nats/token)", 4),
    "kl_divergence_p99": ("KL divergence, 99th percentile", 3),
    "top1_agreement": ("top-1 agreement", 3),
}


def figure(reading: Reading, digits: int) -> str:
    if reading.value is None:
        return f"unknown: {reading.reason}"
    text = f"{reading.value:.{digits}f}"
    if reading.interval95:
        text += f" [{reading.interval95[0]:.{digits}f}, {reading.interval95[1]:.{digits}f}]"
    return text


def line(record: Record) -> str:
    quant = record.config["quant"]
    name = f"rtn, {quant['bits']} bits" if quant["name"] == "rtn" else quant["name"]
    name += f", {record.config['dtype']}" if quant["name"] == "none" else ""
    cells = [name, figure(record.readings["bits_per_weight"], 2)]
    return " | ".join([*cells, *(figure(record.quality[key], digits) for key, (_, digits) in COLUMNS.items())])


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    records = [store.load(path.parent) for path in Path(sys.argv[1]).rglob("record.json")]
    records.sort(key=lambda record: record.quality["kl_divergence_mean"].value or 0.0)
    titles = ["quant", "bits per weight", *(title for title, _ in COLUMNS.values())]
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    print("\n".join(f"| {line(record)} |" for record in records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
