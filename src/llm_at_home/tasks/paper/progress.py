"""How far the paper's runs are: what each would do now, and running those that are missing one after the other."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.pruning import base as pruning
from llm_at_home.quantization import base
from llm_at_home.records import hashing, store
from llm_at_home.records.schema import Record
from llm_at_home.tasks import launch, resolve
from llm_at_home.tasks.paper.estimate import Estimate, estimate, questions_of
from llm_at_home.tasks.paper.options import Options, composed
from llm_at_home.tasks.paper.rows import Run, baseline_words

RUN, AFTER, FINISHED, REFUSED, LEFT_OUT = "to run", "to run after", "finished", "refused", "left out"
OUT_OF_MEMORY = "out_of_memory"
# A run that ended so is a result, and is not run again.
ENDED_WELL = ("ok", "skipped")


@dataclass(frozen=True)
class State:
    """What a run would do now.

    Attributes:
        status: to run, to run after (another), finished, refused or left out.
        why: the refusal, the run that it waits for, or where the finished one is.
        estimate: of a run that is to run.
    """

    run: Run
    words: tuple[str, ...]
    status: str
    why: str = ""
    estimate: Estimate | None = None


class Progress:
    """The paper's runs and what became of each.

    Attributes:
        ended: by name, the status of each run that had its turn: a record's, ``skipped``, ``refused`` or ``left out``.
        why: of those that were refused, left out or failed.
    """

    def __init__(self, planned: Sequence[Run], options: Options) -> None:
        self.planned = planned
        self.options = options
        self.folders: dict[str, Path] = {run.name: run.folder for run in planned}
        self.ended: dict[str, str] = {}
        self.why: dict[str, str] = {}

    def look(self) -> list[State]:
        """What each run would do now; nothing is run or written."""
        states: dict[str, State] = {}
        asked: dict[str, int] = {}
        for run in self.planned:
            states[run.name] = self._look(run, states, asked)
        return list(states.values())

    def run(self) -> int:
        """Run what is missing, in order; 0 when every run left a record or was refused, 1 when one failed.

        A run that is refused, out of memory or failed does not stop the others; being interrupted does.
        """
        deadline = None if self.options.minutes is None else time.monotonic() + 60 * self.options.minutes
        for number, run in enumerate(self.planned, 1):
            if deadline is not None and time.monotonic() > deadline:
                print(f"{self.options.minutes:g} minutes are up: the same command goes on with {run.name}")
                break
            status, why = self._run(run, f"[{number}/{len(self.planned)}] {run.name}")
            self.ended[run.name], self.why[run.name] = status, why
            if status == "interrupted":
                break
        return int(bool({"failed", "timed_out", "interrupted"} & set(self.ended.values())))

    def _run(self, run: Run, title: str) -> tuple[str, str]:
        lacking = [name for name in run.needs if self.ended.get(name) not in ENDED_WELL]
        words = (*run.words, *baseline_words(run, self.folders, self._ended_well()))
        why = run.left_out or (f"{lacking[0]} did not end well" if lacking else "")
        if not why and run.baselines and words == run.words:
            why = f"none of {', '.join(run.baselines)} ended well"
        if why:
            print(f"{title}: left out: {why}", flush=True)
            return LEFT_OUT, why
        print(f"{title}: {run.command(words)}", flush=True)
        try:
            config = _resolved(run, words)
            resolve.check(run.task, config)
            kept = _kept(run, config)
            if kept is not None:
                print(f"kept: {kept.status} in {run.folder} (rerun=true runs it again)")
                return kept.status, ""
            status, record = launch.run_or_skip(run.task, config, run.folder, str(run.folder.parent.resolve()))
        except Refusal as refusal:
            print(f"refused: {refusal}", file=sys.stderr)
            return REFUSED, str(refusal)
        error = record.error if record else None
        return status, str(error["message"]) if error else ""

    def _ended_well(self) -> list[str]:
        return [name for name, status in self.ended.items() if status in ENDED_WELL]

    def _look(self, run: Run, states: Mapping[str, State], asked: dict[str, int]) -> State:
        if run.left_out:
            return State(run, run.words, LEFT_OUT, run.left_out)
        needs = [states[name] for name in (*run.needs, *run.baselines[:1])]
        never = [state for state in needs if state.status in (REFUSED, LEFT_OUT)]
        if never and never[0].run.name in run.needs:
            return State(run, run.words, LEFT_OUT, f"{never[0].run.name} is {never[0].status}")
        possible = [name for name in run.baselines if states[name].status not in (REFUSED, LEFT_OUT)]
        if run.baselines and not possible:
            return State(run, run.words, LEFT_OUT, f"none of {', '.join(run.baselines)} can run")
        words = (*run.words, *baseline_words(run, self.folders, possible))
        waits = [name for name in (*run.needs, *possible[:1]) if states[name].status != FINISHED]
        try:
            config = _resolved(run, words)
            if run.task == "infer":
                asked[run.name] = questions_of(config)
            if not waits:
                resolve.check(run.task, config)
                finished = _kept(run, config) or _finished(run, config)
                if finished is not None:
                    return State(run, words, FINISHED, finished.status)
            making = run.task != "evaluate" and (base.needs_making(config) or pruning.needs_making(config))
            judged = asked.get(run.needs[0], 0) if run.task == "evaluate" else 0
            expected = estimate(run.task, config, making, judged)
        except Refusal as refusal:
            return State(run, words, REFUSED, str(refusal))
        return State(run, words, AFTER if waits else RUN, ", ".join(waits), expected)


def _resolved(run: Run, words: Sequence[str]) -> dict[str, Any]:
    return resolve.resolve(run.task, composed(run.task, words), words)


def _finished(run: Run, config: dict[str, Any]) -> Record | None:
    if config["rerun"]:
        return None
    digest = hashing.config_hash(config, resolve.ingredients(run.task, config))
    folder = store.find_finished(digest, Path(config["paths"]["output"]))
    return None if folder is None else store.load(folder)


def _kept(run: Run, config: dict[str, Any]) -> Record | None:
    """The record of the same run that was out of memory, which is a result; or None."""
    if config["rerun"] or not (run.folder / store.RECORD).is_file():
        return None
    record = store.load(run.folder)
    same = record.config_hash == hashing.config_hash(config, resolve.ingredients(run.task, config))
    return record if same and record.status == OUT_OF_MEMORY else None
