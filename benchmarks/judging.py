"""MT-bench on the embedded model's quantizations, judged by the embedded model, which is tested itself.

    python benchmarks/judging.py --out results/two_core_cpu/mt_bench --minutes 60
    python benchmarks/judging.py --table results/two_core_cpu/mt_bench

Two questions of each category (``--all``: all ten), both turns, in batches. ``OUT/answers/NAME`` holds each run's
record and answers, a second seed of the unquantized model among them, and with ``--adapter RUN_FOLDER`` a fine-tuned
one; ``OUT/single/NAME`` its scores; ``OUT/pairwise/NAME`` its comparisons with the unquantized model, on the first
question of each category; ``OUT/check`` the planted pairs. Judgments are kept without the prompts, which follow from
questions, answers and templates. What is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import rows as common

from llm_at_home.evaluation.judge.comparison import Difference, compare_rows
from llm_at_home.records import store
from llm_at_home.records.jsonl import read_jsonl
from llm_at_home.records.schema import Reading

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
FIRST = [81 + 10 * place for place in range(len(CATEGORIES))]
IDS = FIRST + [number + 1 for number in FIRST]
BASE, SEED, TUNED = "none", "none_seed_1", "fine_tuned"
MODELS = {
    BASE: ["quant=none"],
    SEED: ["quant=none", "seed=1"],
    "nf4": ["quant=nf4"],
    "int8": ["quant=int8"],
    "awq": ["quant=awq"],
    "gptq": ["quant=gptq"],
    TUNED: ["quant=none"],  # and the adapter of --adapter
}
ROWS = ("answers", "single", "check", "pairwise")
SHARED = "other work shared the machine: the speeds are not its own"
PROMPTS = ("user_prompt", "g1_user_prompt", "g2_user_prompt")
CHECKED = (
    ("judge_accuracy", "planted pairs: the reference wins"),
    ("judge_accuracy_corrupted", "corrupted"),
    ("judge_accuracy_truncated", "truncated"),
    ("judge_accuracy_off_topic", "off topic"),
    ("judge_accuracy_single", "planted pairs by scores: the reference has more"),
    ("judge_accuracy_single_corrupted", "corrupted"),
    ("judge_accuracy_single_truncated", "truncated"),
    ("judge_accuracy_single_off_topic", "off topic"),
    ("judge_consistency", "both orders agree"),
    ("judge_position_bias", "the first of two wins, where one does"),
    ("judge_length_bias", "an answer said three times over against the plain one"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="measure what is not there yet")
    parser.add_argument("--table", type=Path, help="print the tables of such a folder")
    parser.add_argument("--minutes", type=float, default=600, help="start no row after so many")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[name for name in MODELS if name != TUNED])
    parser.add_argument("--adapter", help=f"run folder of train.py, for the row {TUNED}")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which of them to measure")
    parser.add_argument("--tokens", type=int, default=256, help="longest answer")
    parser.add_argument("--all", action="store_true", help="all 80 questions are answered and have points")
    parser.add_argument("--shared", action="store_true", help="say in the records that other work shared the machine")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--planted", type=int, default=27, help="questions of home_bench to plant pairs from")
    parser.add_argument("overrides", nargs="*", help="after --, for every run: gpu=cpu, judge=server ...")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return 0
    if not args.out:
        parser.error("give --out or --table")
    if args.adapter and TUNED not in args.models:
        args.models.append(TUNED)
    if TUNED in args.models and not args.adapter:
        parser.error(f"{TUNED} wants --adapter RUN_FOLDER")
    return measure(args)


def steps(args: argparse.Namespace) -> list[tuple[str, list[str], str]]:
    """Name, command and the file to keep of each row, in the order of running."""
    out = args.out.resolve()
    asked = ["questions=mt_bench", *([] if args.all else [f"questions.ids=[{','.join(map(str, IDS))}]"])]
    first = [f"questions.ids=[{','.join(map(str, FIRST))}]", "questions=mt_bench"]
    base = f"{out}/answers/{BASE}"
    rows = []
    for name in args.models:
        adapter = [f"adapter_path={args.adapter}"] if name == TUNED else []
        length = [f"engine.max_new_tokens={args.tokens}", f"engine.batch_size={args.batch}", "engine.warmup_tokens=4"]
        rows.append((f"answers/{name}", ["infer.py", *asked, *length, *MODELS[name], *adapter], "answers.jsonl"))
        rows.append((f"single/{name}", ["evaluate.py", f"answers={out}/answers/{name}"], "judgments.jsonl"))
    check = ["evaluate.py", "task=judge_check", "questions=home_bench", f"limit={args.planted}"]
    rows.append(("check", check, "judgments.jsonl"))
    for name in args.models:
        if name != BASE and BASE in args.models:
            words = ["judge.mode=pairwise", f"answers={out}/answers/{name}", f"baseline={base}"]
            rows.append((f"pairwise/{name}", ["evaluate.py", *words, *first], "judgments.jsonl"))
    return rows


def measure(args: argparse.Namespace) -> int:
    """Run what is not there yet; 1 when something left no usable record."""
    deadline = time.monotonic() + args.minutes * 60
    failed = False
    for name, command, kept in steps(args):
        if name.split("/")[0] not in args.rows or common.status(args.out / name) in common.DONE:
            continue
        if time.monotonic() > deadline:
            print(f"{args.minutes:g} minutes are up: the same command goes on with {name}")
            return int(failed)
        asks_nobody = command[0] == "infer.py"
        words = [*command, "logger=none", *(w for w in args.overrides if not (asks_nobody and w.startswith("judge")))]
        print(
            common.run_row(name, words, args.out, ("decode_tokens_per_second", "judge_score_mean", "win_rate"), [kept]),
            flush=True,
        )
        if common.status(args.out / name) in common.DONE:
            slim(args.out / name)
            if args.shared:
                note_shared(args.out / name)
        else:
            failed = True
    return int(failed)


def note_shared(folder: Path) -> None:
    """Say that a record's speeds are not the machine's."""
    record = store.load(folder)
    record.notes.append(SHARED)
    store.save(record, folder)


def slim(folder: Path) -> None:
    """Leave the prompts out of kept judgments: questions, answers and templates give them again."""
    file = folder / "judgments.jsonl"
    if file.is_file():
        rows = [{key: value for key, value in row.items() if key not in PROMPTS} for row in read_jsonl(file)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(folder: Path) -> str:
    """The tables of docs/judging.md; no speeds of a CPU, which other work shared."""
    titles = [
        "quant",
        "score, mean (1 to 10)",
        "turn 1",
        "turn 2",
        "less none's, paired",
        "p",
        "win rate against none (%)",
    ]
    lines = [[*titles, "first of two wins (%)", "missing"]]
    for name in MODELS:
        if common.status(folder / "single" / name) != "ok":
            continue
        single = store.load(folder / "single" / name)
        scores = [cell(single.quality.get(f"judge_score_{what}"), 3) for what in ("mean", "turn_1", "turn_2")]
        lead, p_value = (common.DASH, common.DASH) if name == BASE else against_base(folder, name)
        rates = [common.DASH] * 2
        missing = single.counts["judgments_missing"]
        if common.status(folder / "pairwise" / name) == "ok":
            pairs = store.load(folder / "pairwise" / name)
            rates = [cell(pairs.quality.get(key), 1, 100) for key in ("win_rate", "judge_first_wins")]
            missing += pairs.counts["judgments_missing"]
        lines.append([name.replace("_", " "), *scores, lead, p_value, *rates, str(missing)])
    parts = [common.markdown(lines), *answered(folder)]
    if common.status(folder / "check") == "ok":
        quality = store.load(folder / "check").quality
        known = [(key, title) for key, title in CHECKED if key in quality]
        rows = [[title, cell(quality[key], 3), str(quality[key].n or common.DASH)] for key, title in known]
        rows += noise(folder)
        parts.append(common.markdown([["the judge itself", "figure", "questions"], *rows]))
    return "\n\n".join(parts)


def answered(folder: Path) -> list[str]:
    """What the answers took, where a GPU gave them, as a Markdown table."""
    kinds = (("measured_time", 1), ("output_tokens_per_second", 0), ("energy_gross", 2), ("torch_allocated_peak", 1))
    lines = [["quant", "new tokens", "time (s)", "tokens/s", "energy (Wh)", "torch allocated (GB)", "note"]]
    for name in MODELS:
        if common.status(folder / "answers" / name) != "ok":
            continue
        record = store.load(folder / "answers" / name)
        if record.config["gpu"]["device"] != "cuda":
            continue
        cells = [cell(record.readings.get(key), digits) for key, digits in kinds]
        lines.append(
            [name.replace("_", " "), f"{record.counts['generated_tokens']:,}", *cells, "; ".join(record.notes)]
        )
    return [common.markdown(lines)] if lines[1:] else []


def difference(folder: Path, name: str) -> Difference | None:
    """A run's scores less those of the unquantized model, question by question."""
    sides = [folder / "single" / one for one in (name, BASE)]
    if any(common.status(side) != "ok" for side in sides):
        return None
    one, base = (list(read_jsonl(side / "judgments.jsonl")) for side in sides)
    return compare_rows(one, base)


def against_base(folder: Path, name: str) -> tuple[str, str]:
    """The difference with its interval, and its p value."""
    found = difference(folder, name)
    if found is None or found.interval95 is None:
        return common.DASH, common.DASH
    low, high = found.interval95
    chance = "< 0.01" if found.p_value < 0.01 else f"{found.p_value:.2f}"
    return f"{found.difference:+.3f} [{low:+.3f}, {high:+.3f}]", chance


def noise(folder: Path) -> list[list[str]]:
    """What a difference of two runs' mean scores must be to show, from two seeds of one model."""
    found = difference(folder, SEED)
    if found is None or found.detectable is None:
        return []
    return [["smallest difference of mean scores that shows (points)", f"{found.detectable:.3f}", str(found.n)]]


def cell(reading: Reading | None, digits: int, factor: float = 1) -> str:
    """A figure with its interval."""
    if reading is None or reading.value is None:
        return common.DASH
    ends = reading.interval95
    interval = f" [{factor * ends[0]:.{digits}f}, {factor * ends[1]:.{digits}f}]" if ends else ""
    return f"{factor * reading.value:.{digits}f}{interval}"


if __name__ == "__main__":
    sys.exit(main())
