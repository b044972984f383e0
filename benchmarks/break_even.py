"""Prompt, retrieve or fine-tune: what each is worth on the handbook's questions, and from how many on which is cheaper.

    python benchmarks/break_even.py --out results/two_core_cpu/break_even
    python benchmarks/break_even.py --out FOLDER --adapter RUN_FOLDER -- quant=nf4
    python benchmarks/break_even.py --table results/two_core_cpu/break_even

Rows, each one run in a process of its own: ``nothing`` (the bare question), ``retrieved`` and ``all`` (the facts that
BM25 finds, or all of them, in the system message), and ``fine_tuned`` (the bare question to the model with an adapter).
The first three have the same instruction; the fourth was trained to answer so. Questions are asked one by one. Without
``--adapter``, ``train.py experiment=handbook`` makes one first and leaves its record as ``train`` (the weights go to
``multirun/break_even``, and are needed until ``fine_tuned`` has answered). What is there is not run again: the same
command goes on where it stopped.

Fine-tuning costs F once and f a question; prompting costs p a question. After n questions they have cost F + n f and
n p, so fine-tuning is the cheaper one from

    n = F / (p - f)

on, and never where f >= p. F, f and p are in tokens processed, in seconds or in Wh:

    tokens  F: optimizer steps x tokens a step (padding left out); f, p: prompt and generated tokens
    time    F: the whole training run, loading and saving with it; f, p: seconds a question, without loading the model
    energy  F: gross energy of the training steps alone; f, p: of answering; all by the record's method

A trained token is forward and backward and so costs two to three times one that is read: time and energy know that, a
count of tokens does not. The interval of n is that of the worst and best case within the 95 % intervals of f and p (F
was measured once): wide rather than narrow. ``prefix kept`` is n where a server keeps the keys and values of what all
prompts of a row begin with, so that its tokens are read once and not with each question (:func:`without_prefix`).
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import rows as common

from llm_at_home.records import store
from llm_at_home.records.schema import Reading, Record
from llm_at_home.reporting import facts

# Of four, the one with most answers right on 36 questions of the training split, with retrieved facts.
INSTRUCTION = (
    "Answer with the name, number or words asked for alone, not with a sentence. "
    "If it is not below, answer: The handbook does not say."
)
COMMON = ["evaluate.py", "task=text", "text.batch_size=1", "text.perplexity=false", "logger=none"]
PROMPTS = {"nothing": "none", "retrieved": "retrieved", "all": "all"}
TUNED, TRAIN = "fine_tuned", "train"
HEADLINE = ("exact_match", "reference_contained", "prompt_tokens_per_question", "time_per_question")
WEIGHTS = Path("multirun", "break_even")  # from the repository's root; too large to be kept with the records


@dataclass(frozen=True)
class Cost:
    """What one question takes, with the ends of its 95 % interval (equal where there is none)."""

    value: float
    low: float
    high: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.value + other.value, self.low + other.low, self.high + other.high)


@dataclass(frozen=True)
class BreakEven:
    """After how many questions fine-tuning has cost less, and the ends of that; infinity is never."""

    questions: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isinf(self.questions):
            return "never" if math.isinf(self.low) else f"never [{self.low:,.0f}, never]"
        end = "never" if math.isinf(self.high) else f"{self.high:,.0f}"
        ends = "" if self.low == self.high else f" [{self.low:,.0f}, {end}]"
        return f"{self.questions:,.0f}{ends}"


def break_even(fixed: float, prompted: Cost, tuned: Cost) -> BreakEven:
    """The number of questions n from which ``fixed + n tuned`` is less than ``n prompted``.

    Args:
        fixed: what fine-tuning takes once, in tokens, seconds or Wh.
        prompted: what a question takes with the facts in its prompt, in the same unit.
        tuned: what it takes after fine-tuning.
    """

    def count(saved: float) -> float:
        return math.ceil(fixed / saved) if saved > 0 else math.inf

    return BreakEven(
        count(prompted.value - tuned.value), count(prompted.high - tuned.low), count(prompted.low - tuned.high)
    )


def cost(reading: Reading | None) -> Cost | None:
    """The reading as a cost, or None where it is unknown."""
    if reading is None or reading.value is None:
        return None
    return Cost(reading.value, *(reading.interval95 or (reading.value, reading.value)))


def tokens(record: Record) -> Cost | None:
    """Tokens that a question takes, read and made."""
    read, made = (cost(record.readings.get(f"{kind}_tokens_per_question")) for kind in ("prompt", "generated"))
    return None if read is None or made is None else read + made


def watt_hours(record: Record) -> Cost | None:
    """Wh that a question takes."""
    joules = cost(record.readings.get("energy_per_question"))
    return None if joules is None else Cost(*(end / 3600 for end in (joules.value, joules.low, joules.high)))


def training_tokens(train: Record) -> float | None:
    """Tokens that the training run read, padding left out: those of a mean step, warm-up aside, times the steps."""
    rates = [train.readings.get(name) for name in ("tokens_per_second", "steps_per_second")]
    if any(rate is None or rate.value is None for rate in rates):
        return None
    return rates[0].value / rates[1].value * train.counts["optimizer_steps"]


def without_prefix(record: Record) -> tuple[Cost | None, Cost | None]:
    """Tokens and seconds of a question where what all prompts begin with is read once and kept.

    The seconds are an estimate: less those that the prefix takes at the measured prefill rate. They leave out that a
    kept prefix is still attended to, and that a short prompt is read at a lower rate than a long one.
    """
    prefix, rate = (record.readings.get(key) for key in ("prompt_tokens_shared", "prefill_tokens_per_second"))
    seconds, read = cost(record.readings.get("time_per_question")), tokens(record)
    if prefix is None or prefix.value is None:
        return None, None
    saved = None if rate is None or rate.value is None else prefix.value / rate.value
    return (
        None if read is None else read + Cost(*[-prefix.value] * 3),
        None if seconds is None or saved is None else seconds + Cost(*[-saved] * 3),
    )


def break_evens(train: Record, prompted: Record, tuned: Record) -> dict[str, BreakEven | str]:
    """By tokens, time and energy, and with the shared prefix kept; where there is no figure, the reason."""
    energy, seconds, read = train.readings.get("energy_gross"), train.provenance.get("seconds"), training_tokens(train)
    taken = [cost(record.readings.get("time_per_question")) for record in (prompted, tuned)]
    kept = [without_prefix(record) for record in (prompted, tuned)]
    sides = {
        "tokens": (read, tokens(prompted), tokens(tuned)),
        "tokens, prefix kept": (read, kept[0][0], kept[1][0]),
        "time": (seconds, *taken),
        "time, prefix kept (estimate)": (seconds, kept[0][1], kept[1][1]),
        "energy": (energy and energy.value, watt_hours(prompted), watt_hours(tuned)),
    }
    found: dict[str, BreakEven | str] = {}
    for name, (fixed, before, after) in sides.items():
        if fixed is None or before is None or after is None:
            unknown = (record.readings.get("energy_gross") for record in (train, prompted, tuned))
            reasons = [one.reason for one in unknown if one is not None and one.reason]
            found[name] = f"unknown: {reasons[0]}" if name == "energy" and reasons else "unknown: not measured"
        else:
            found[name] = break_even(fixed, before, after)
    return found


def table(folder: Path) -> str:
    """The records below a folder as Markdown: what each row is worth and takes, what training took, and n."""
    there = {name: store.load(folder / name) for name in (*PROMPTS, TUNED) if common.status(folder / name) == "ok"}
    columns = {
        "exact match (%)": ("exact_match", 100, 1),
        "answer in the reply (%)": ("reference_contained", 100, 1),
        "token F1 (%)": ("token_f1", 100, 1),
        "refusal recall (%)": ("refusal_recall", 100, 1),
        "false refusals (%)": ("false_refusal_rate", 100, 1),
        "prompt tokens/question": ("prompt_tokens_per_question", 1, 1),
        "generated tokens/question": ("generated_tokens_per_question", 1, 1),
        "s/question": ("time_per_question", 1, 2),
    }
    lines = [["facts", *columns, "Wh/question"]]
    for name, record in there.items():
        figures = record.readings | record.quality
        energy = watt_hours(record)
        cells = [_cell(figures.get(key), *shown) for key, *shown in columns.values()]
        lines.append([name.replace("_", "-"), *cells, f"{energy.value:.5f}" if energy else "unknown"])
    text = common.markdown(lines)
    if TUNED not in there or common.status(folder / TRAIN) != "ok":
        return text
    train = store.load(folder / TRAIN)
    energy, read = train.readings["energy_gross"], training_tokens(train)
    text += f"\n\nFine-tuning once: {read or math.nan:,.0f} tokens, {train.provenance['seconds']:,.0f} s, "
    text += f"{energy.value:.2f} Wh.\n\n" if energy.value is not None else f"energy unknown ({energy.reason}).\n\n"
    found = {n: break_evens(train, there[n], there[TUNED]) for n in ("retrieved", "all") if n in there}
    names = list(next(iter(found.values()), {}))
    lines = [["questions after which fine-tuning has cost less, in", *(f"than {name}" for name in found)]]
    lines += [[name, *(_short(one[name]) for one in found.values())] for name in names]
    return text + common.markdown(lines)


def _cell(reading: Reading | None, factor: int, digits: int) -> str:
    if reading is None or reading.value is None:
        return common.DASH
    ends = (
        ""
        if reading.interval95 is None
        else " [{:,.{d}f}, {:,.{d}f}]".format(*(end * factor for end in reading.interval95), d=digits)
    )
    return f"{reading.value * factor:,.{digits}f}{ends}"


def _short(found: BreakEven | str) -> str:
    return str(found).split(":")[0]


def is_there(kept: Path, run: Path) -> bool:
    """Whether the training run whose record is kept still has its weights."""
    if common.status(kept) != "ok" or common.status(run) != "ok" or not (run / "adapter").is_dir():
        return False
    return store.load(kept).config_hash == store.load(run).config_hash


def measure(args: argparse.Namespace) -> int:
    """Run what is not there yet; 1 when something left no usable record."""
    adapter = args.adapter or WEIGHTS / args.out.name
    if not all(common.status(args.out / name) == "ok" for name in (TRAIN, TUNED)):
        if args.adapter is None and not is_there(args.out / TRAIN, common.ROOT / adapter):
            words = ["train.py", "experiment=handbook", "logger=none", "rerun=true", *args.overrides]
            subprocess.run([sys.executable, *words, f"hydra.run.dir={adapter}"], cwd=common.ROOT, check=False)
        store.save(store.load(common.ROOT / adapter), args.out / TRAIN)
    if common.status(args.out / TRAIN) != "ok":
        print(f"{TRAIN}: {facts.error_line(store.load(args.out / TRAIN))}", file=sys.stderr)
        return 1
    questions = [*COMMON, *([f"limit={args.limit}"] if args.limit else []), *args.overrides]
    prompts = {
        name: [f"text.context={choice}", f"text.instruction='{INSTRUCTION}'"] for name, choice in PROMPTS.items()
    }
    # What the break-even needs comes first, for whoever stops early.
    for name, words in {TUNED: [f"adapter_path={adapter}"], **dict(reversed(prompts.items()))}.items():
        if common.status(args.out / name) != "ok":
            print(common.run_row(name, [*questions, *words], args.out, HEADLINE, ["answers.jsonl"]), flush=True)
    print(table(args.out))
    return int(any(common.status(args.out / name) != "ok" for name in (*PROMPTS, TUNED)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="measure, and keep each row's record below this folder")
    what.add_argument("--table", type=Path, metavar="FOLDER", help="print the tables of the records in this folder")
    parser.add_argument(
        "--adapter", type=Path, metavar="RUN_FOLDER", help="a finished training run, in place of a new one"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="ask the first N questions, in every row")
    parser.add_argument(
        "overrides", nargs="*", help="after --: overrides for training and for every row, such as gpu=cpu"
    )
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return 0
    return measure(args)


if __name__ == "__main__":
    sys.exit(main())
