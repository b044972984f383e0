"""What each choice saves and costs in training: memory, time and the loss, one choice at a time and together.

    python benchmarks/training_memory.py --out results/two_core_cpu/training_memory -- gpu=cpu
    python benchmarks/training_memory.py --table results/two_core_cpu/training_memory
    python benchmarks/training_memory.py --out FOLDER --rows one_batch loss_liger offload -- gpu=cuda
    python benchmarks/training_memory.py --out FOLDER --fill 53 --rows full_paged_adamw_8bit -- gpu=cuda

A row is one run of ``train.py data=synthetic``, in a process of its own: five optimizer steps over 4 conversations of
256 random tokens, the first of them not timed. The same seed and data throughout: a choice that changes no figure ends
at the reference's loss, which says nothing else. What is there is not run again. With ``--fill`` so many GB of the card
are taken meanwhile, so that what is paged has to move; such rows belong into a folder of their own, and not among
the records that the report reads.
"""

from __future__ import annotations

import sys
from pathlib import Path

import rows as common

from llm_at_home.records import store

REFERENCE = "one_batch"
SPLIT = ["data.batch_size=1", "callbacks.accumulation.steps=4"]
ROWS = {
    REFERENCE: [],
    "micro_batches_of_1": SPLIT,
    "checkpointing_2": ["memory.checkpointing=2"],
    "checkpointing_full": ["memory.checkpointing=full"],
    "loss_tokens_256": ["memory.loss_tokens=256"],
    "smallest": ["memory=smallest"],
    "smallest_micro_batches_of_1": ["memory=smallest", *SPLIT],
    "adamw_8bit": ["optimizer=adamw_8bit"],
    "sgd": ["optimizer=sgd"],
    "full": ["adapter=full"],
    "full_adamw_8bit": ["adapter=full", "optimizer=adamw_8bit"],
    "full_sgd": ["adapter=full", "optimizer=sgd"],
    "full_sgd_smallest": ["adapter=full", "optimizer=sgd", "memory=smallest"],
}
# What a CPU refuses; they are run where they are named.
GPU_ROWS = {
    "loss_liger": ["memory.loss=liger"],
    "offload": ["memory.checkpointing=full", "memory.offload=true"],
    "full_paged_adamw_8bit": ["adapter=full", "optimizer=paged_adamw_8bit"],
    "full_adamw_offload": ["adapter=full", "optimizer=adamw_offload"],
}
ALL = {**ROWS, **GPU_ROWS}
PROTOCOL = ["train.py", "data=synthetic", "data.max_length=256", "data.batch_size=4", "callbacks.accumulation.steps=1"]
PROTOCOL += ["trainer.max_steps=5", "limit=20", "callbacks.power.idle_seconds=0", "logger=none"]
MEMORY = ("resident_set_peak", "torch_allocated_peak", "torch_reserved_peak")
HEADLINE = ("steps_per_second", *MEMORY, "loss_last")


def table(folder: Path) -> str:
    """The records below a folder as a Markdown table, time and memory as ratios to the reference's.

    A row of another machine than the reference's has no ratio of time: two hosts with one kind of card differ by half.
    """
    there = {name: store.load(folder / name) for name in ALL if common.status(folder / name) is not None}
    reference = there.get(REFERENCE)
    lines = [["choice", "resident set, peak (GB)", "torch allocated, peak (GB)", "peak / one batch's"]]
    lines[0] += ["seconds a step / one batch's", "loss, last step"]
    for name, record in there.items():
        # Steps a second: the reference's over this one's.
        pace = common.ratio(common.beside(reference, record), record, "steps_per_second")
        peak = next((key for key in reversed(MEMORY[:2]) if common.has(record, key)), MEMORY[0])
        lines.append(
            [
                name.replace("_", " ") if record.status == "ok" else f"{name} ({record.status})",
                *(common.text(record.readings.get(key), 2) for key in MEMORY[:2]),
                common.ratio(record, reference, peak),
                pace,
                common.text(record.quality.get("loss_last"), 3),
            ]
        )
    return common.markdown(lines)


if __name__ == "__main__":
    sys.exit(common.run_choices(__doc__, PROTOCOL, ALL, ROWS, HEADLINE, table))
