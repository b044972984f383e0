"""The child process of one job: ``python -m llm_at_home.tasks.child FOLDER`` runs what FOLDER/job.json says.

Whatever happens, it leaves a record; only a refusal leaves none.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from llm_at_home.errors import Interrupted, Refusal, full_traceback
from llm_at_home.hardware import condition, emulation
from llm_at_home.pruning import base as pruning
from llm_at_home.records import provenance, store
from llm_at_home.records.schema import Record
from llm_at_home.records.tracking import Tracker
from llm_at_home.tasks import helper, logs, resolve
from llm_at_home.tasks.launch import EXIT_FAILED, EXIT_REFUSED, REFUSAL

log = logging.getLogger("llm_at_home")
PR_SET_PDEATHSIG = 1
PARENT_POLL_SECONDS = 1.0


def main(folder: Path) -> int:
    """Run the job, write its record, and return the exit code."""
    job = json.loads((folder / store.JOB).read_text(encoding="utf-8"))
    _die_with_parent(job["config"]["grace_s"])
    with (folder / "job.log").open("a", encoding="utf-8") as log_file:
        faulthandler.enable(log_file)
        signal.signal(signal.SIGTERM, _interrupt)  # Ctrl-C raises by itself
        logs.set_up(logging.StreamHandler(log_file))
        return _run(job, folder)


def _run(job: dict[str, Any], folder: Path) -> int:
    task, config = job["task"], job["config"]
    if helper.is_helper():
        return _help(task, config, folder)
    helper.mark_children()
    record = Record(task=task, config=config, config_hash=job["config_hash"], provenance=provenance.collect())
    tracker = _open_tracker(record, folder, job["sweep"])
    start = time.perf_counter()
    try:
        _prepare_card(config, record)
        resolve.task_module(task).run(config, folder, record, tracker)
    except Refusal as refusal:
        (folder / REFUSAL).write_text(str(refusal), encoding="utf-8")
        if tracker is not None:
            tracker.discard()
        return EXIT_REFUSED
    except (Interrupted, KeyboardInterrupt) as error:
        _fail(record, "interrupted", error)
    except Exception as error:
        _fail(record, "out_of_memory" if _is_out_of_memory(error) else "failed", error)
    if config["gpu"]["device"] == "cuda":
        record.provenance["gpu_after"] = condition.snapshot()
    finished = resolve.ingredients(task, config) | pruning.provenance(config)
    record.readings |= pruning.readings(config)
    record.provenance |= {
        "finished_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 1),
        "seed": config["seed"],
        **{key: value for key, value in finished.items() if key not in ("task", "packages", "gpu")},
    }
    if tracker is not None:
        if tracker.problem:
            record.notes.append(tracker.problem)
        store.save(record, folder)
        tracker.close(record, folder)
        if tracker.problem and tracker.problem not in record.notes:
            record.notes.append(tracker.problem)
    store.save(record, folder)
    return EXIT_FAILED if record.status == "failed" else 0


def _help(task: str, config: dict[str, Any], folder: Path) -> int:
    """The same job beside the process that leaves the record; where this one fails, Lightning ends the other."""
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            resolve.task_module(task).run(config, folder, Record(task=task, config=config), None)
    except (Interrupted, KeyboardInterrupt):
        return 0  # the other was asked to stop as well
    except Exception as error:
        logging.getLogger("job").error("".join(traceback.format_exception(error)))
        return EXIT_FAILED
    return 0


def _prepare_card(config: dict[str, Any], record: Record) -> None:
    """See that the GPU is itself and nobody else's, and make it as small as the one that was asked for.

    Raises:
        Refusal: with ``strict=true`` on a card that is busy, throttled or limited.
    """
    if config["gpu"]["device"] != "cuda":
        return
    flags = condition.card_condition(config["gpu"])  # before this process itself is on the card
    condition.require_clean(flags, config["strict"])
    record.notes += flags
    record.provenance["gpu_before"] = condition.snapshot()
    capped = emulation.cap_memory(config["gpu"])
    if capped:
        record.provenance["emulation"] = capped


def _open_tracker(record: Record, folder: Path, sweep: str | None) -> Tracker | None:
    logger = record.config["logger"]
    if logger["name"] == "none":
        return None
    groups = [key for key in ("model", "quant", "prune", "adapter", "gpu") if key in record.config]
    tags: dict[str, str] = {"task": record.task, **{key: _name(record.config[key]) for key in groups}}
    words = [tags[key] for key in ("task", "model", "quant", "prune", "adapter") if tags.get(key, "none") != "none"]
    tracker = Tracker(logger["tracking_uri"], logger["experiment"], " ".join(words), sweep)
    tracker.open(record.config, tags)
    tracker.leave(folder)
    return tracker


def _name(group: dict[str, Any]) -> str:
    real_card = None if group.get("emulated") else group.get("card")
    return str(real_card or group["name"])


def _interrupt(number: int, frame: Any) -> None:
    raise Interrupted(signal.Signals(number).name)


def _fail(record: Record, status: str, error: BaseException) -> None:
    record.status = status
    lines = traceback.format_exception(error)
    logging.getLogger("job").error("".join(lines))  # to job.log; the terminal gets the one line of the record
    if full_traceback():
        print("".join(lines), file=sys.stderr)
    message = str(error).splitlines()[0] if str(error) else "asked to stop"
    record.error = {"type": type(error).__name__, "message": message, "traceback": "".join(lines)[-4000:]}


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _die_with_parent(grace_s: float) -> None:
    """No job outlives its command: a killed parent is a SIGTERM at once (Linux), and the end after the grace period."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_SECONDS)
        time.sleep(grace_s)
        os.killpg(os.getpgrp(), signal.SIGKILL)  # the job is a session of its own, so this ends what it started too

    threading.Thread(target=watch, daemon=True).start()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
