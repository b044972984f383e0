"""What padding costs in training, and what three ways to have less of it save.

    python benchmarks/padding.py --out results/two_core_cpu/padding -- gpu=cpu
    python benchmarks/padding.py --table results/two_core_cpu/padding

A row is one run of ``train.py`` in a process of its own: one pass over 96 conversations of the handbook, every other
one a dialogue and so about twice as long, eight in a batch, the first step not timed. ``padded`` and ``packed`` make
their steps of the same conversations in the same order, so that their losses are to be the same; batches by length hold
others. Tokens a second leave padding out. What is there is not run again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import rows as common

from llm_at_home.records import store

REFERENCE = "padded"
ROWS = {
    REFERENCE: [],
    "by_length": ["data.group_by_length=true"],
    "packed": ["data.packing=true"],
    "by_length_packed": ["data.group_by_length=true", "data.packing=true"],
}
CONVERSATIONS = Path("multirun", "padding", "conversations.jsonl")  # from the repository's root
KINDS = 48  # conversations of each
PROTOCOL = ["train.py", "data=jsonl", f"data.path={CONVERSATIONS}", f"data.test_path={CONVERSATIONS}"]
PROTOCOL += ["data.batch_size=8", "callbacks.accumulation.steps=1", "trainer.max_steps=12", "optimizer.lr=1e-3"]
PROTOCOL += ["callbacks.power.idle_seconds=0", "logger=none"]
HEADLINE = ("tokens_per_second", "resident_set_peak", "loss_last")


def write_conversations() -> None:
    """Half of them dialogues, of two questions and answers, and half single questions."""
    handbook = common.ROOT / "src/llm_at_home/data/handbook/train.jsonl"
    lines = [line for line in handbook.read_text(encoding="utf-8").splitlines() if line]
    dialogues = [line for line in lines if json.loads(line)["kind"] == "dialogue"][:KINDS]
    questions = [line for line in lines if json.loads(line)["kind"] == "fact"][:KINDS]
    file = common.ROOT / CONVERSATIONS
    file.parent.mkdir(parents=True, exist_ok=True)
    mixed = [line for pair in zip(dialogues, questions, strict=True) for line in pair]
    file.write_text("\n".join(mixed) + "\n", encoding="utf-8")


def table(folder: Path) -> str:
    """The records below a folder as a Markdown table; speeds beside the reference's where it ran on that machine."""
    there = {name: store.load(folder / name) for name in ROWS if common.status(folder / name) is not None}
    reference = there.get(REFERENCE)
    lines = [["batches", "tokens/s", f"of {REFERENCE}'s", "steps/s", "resident set, peak (GB)", "loss, last step"]]
    for name, record in there.items():
        lines.append(
            [
                name.replace("_", " ") if record.status == "ok" else f"{name} ({record.status})",
                common.text(record.readings.get("tokens_per_second"), 1),
                common.ratio(record, common.beside(reference, record), "tokens_per_second"),
                common.text(record.readings.get("steps_per_second"), 2),
                common.text(record.readings.get("resident_set_peak"), 2),
                common.text(record.quality.get("loss_last"), 4),
            ]
        )
    return common.markdown(lines)


if __name__ == "__main__":
    if "--out" in sys.argv:
        write_conversations()
    sys.exit(common.run_choices(__doc__, PROTOCOL, ROWS, ROWS, HEADLINE, table))
