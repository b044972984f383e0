"""The tables of docs/fidelity.md from the folders of ``experiment=fidelity``: what is lost, the controls, and pairs.

python evaluate.py -m experiment=fidelity quant=int8,nf4,nf4_nested,fp4
python evaluate.py -m experiment=fidelity quant=rtn quant.group_size=32 quant.bits=8,4,3,2
python evaluate.py -m experiment=fidelity quant=none dtype=float32,bfloat16
python evaluate.py -m experiment=fidelity quant=none,nf4 fidelity.answers_seed=0,1
python benchmarks/fidelity_table.py multirun/evaluate
python benchmarks/fidelity_table.py results/two_core_cpu/methods
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from llm_at_home.errors import Refusal
from llm_at_home.evaluation.fidelity import SUFFIXES
from llm_at_home.evaluation.fidelity.comparison import Difference, Run, compare, is_control
from llm_at_home.evaluation.fidelity.figures import DETECTABLE
from llm_at_home.records.schema import Reading

COLUMNS = {
    "perplexity_ratio": ("perplexity ratio", 3),
    "kl_divergence_mean": ("KL divergence, mean (nats/token)", 4),
    "kl_divergence_p99": ("KL divergence, 99th percentile", 3),
    "top1_agreement": ("top-1 agreement", 3),
}
TITLES = {"held_out": "held-out texts", "own_answers": "the baseline's own answers"}
# Which methods are set against each other wherever both are there, at the same bits and groups.
PAIRS = (
    ("gptq", "rtn"),
    ("awq", "rtn"),
    ("awq", "gptq"),
    ("gptq_mixed", "gptq"),
    ("nf4", "fp4"),
    ("nf4_nested", "nf4"),
    ("nf4", "rtn"),
    ("int4_torchao", "rtn"),
    ("int8", "rtn"),
    ("int8_torchao", "rtn"),
)


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    folders = sorted(path.parent for path in Path(sys.argv[1]).rglob("record.json"))
    runs = []
    for folder in folders:
        try:
            runs.append(Run.load(folder))
        except Refusal as refusal:
            print(f"left out: {refusal}", file=sys.stderr)
    runs.sort(key=lambda run: run.record.quality["kl_divergence_mean"].value or 0.0)
    for name, suffix in SUFFIXES.items():
        print(table(TITLES[name], suffix, runs))
    print(
        pairs("Controls: the baseline in another dtype, and the same under another draw of its answers", controls(runs))
    )
    print(pairs("Paired comparisons, a less b", chosen(runs)))
    return 0


def table(title: str, suffix: str, runs: list[Run]) -> str:
    """A row a run; after each interval, in brackets, the smallest difference from the baseline that could be told."""
    lines = [
        f"\n{title[0].upper()}{title[1:]}; ± is the smallest difference from the baseline that shows (power 80 %)\n"
    ]
    lines += head(["quant", "bits per weight", *(words for words, _ in COLUMNS.values())])
    for run in runs:
        figures = run.record.quality
        if f"kl_divergence_mean{suffix}" in figures:
            cells = [
                shown(figures[key + suffix], digits) + least(figures[key + suffix + DETECTABLE], digits)
                for key, (_, digits) in COLUMNS.items()
            ]
            lines.append(row([run.name, shown(run.record.readings["bits_per_weight"], 2), *cells]))
    return "\n".join(lines)


def shown(reading: Reading, digits: int) -> str:
    if reading.value is None:
        return f"unknown: {reading.reason}"
    text = f"{reading.value:.{digits}f}"
    if reading.interval95:
        text += f" [{reading.interval95[0]:.{digits}f}, {reading.interval95[1]:.{digits}f}]"
    return text


def least(reading: Reading, digits: int) -> str:
    return "" if reading.value is None else f" ±{reading.value:.{digits}f}"


def controls(runs: list[Run]) -> list[tuple[Run, Run]]:
    """Pairs that are the same but for the seed of the answers, and the dense model in two dtypes."""
    found = []
    for a, b in itertools.combinations(runs, 2):
        dense = all(run.record.config["quant"]["name"] == "none" for run in (a, b))
        if is_control(a.record, b.record) or (dense and same_answers(a, b)):
            found.append((a, b))
    return found


def chosen(runs: list[Run]) -> list[tuple[Run, Run]]:
    found = []
    for names in PAIRS:
        for a, b in itertools.product(runs, runs):
            quants = [run.record.config["quant"] for run in (a, b)]
            if tuple(quant["name"] for quant in quants) == names and same_answers(a, b) and alike(*quants):
                found.append((a, b))
    return found


def same_answers(a: Run, b: Run) -> bool:
    seeds = [run.record.config["fidelity"]["answers_seed"] for run in (a, b)]
    return seeds[0] == seeds[1]


def alike(a: dict[str, object], b: dict[str, object]) -> bool:
    """The same bits, and the same groups where both have groups; a mixture stands beside its target's bits."""
    bits = [quant.get("bits") or quant.get("target_bits") for quant in (a, b)]
    groups = [quant.get("group_size") for quant in (a, b)]
    return bits[0] == bits[1] and (groups[0] == groups[1] or None in groups)


def pairs(title: str, found: list[tuple[Run, Run]]) -> str:
    lines = [f"\n{title}; * marks an interval without 0, ± is the smallest difference that shows (power 80 %)\n"]
    lines += head(["a", "b", "on", *(words for words, _ in COLUMNS.values())])
    for a, b in found:
        try:
            differences = {one.figure: one for one in compare(a, b)}
        except Refusal as refusal:
            lines.append(row([a.name, b.name, str(refusal), *[""] * len(COLUMNS)]))
            continue
        for name, suffix in SUFFIXES.items():
            if f"kl_divergence_mean{suffix}" in differences:
                cells = [told(differences.get(key + suffix), digits) for key, (_, digits) in COLUMNS.items()]
                lines.append(row([a.name, b.name, TITLES[name], *cells]))
    return "\n".join(lines) if found else f"\n{title}: none among these runs"


def told(one: Difference | None, digits: int) -> str:
    if one is None:
        return "unknown"
    low, high = one.interval95
    mark = "*" if one.excludes_zero else ""
    return f"{one.difference:+.{digits}f}{mark} [{low:+.{digits}f}, {high:+.{digits}f}] ±{one.detectable:.{digits}f}"


def head(titles: list[str]) -> list[str]:
    return [row(titles), f"|{' --- |' * len(titles)}"]


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
