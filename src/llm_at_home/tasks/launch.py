"""Launches a job: resolve, refuse or skip, run it in a fresh child process, and see that it leaves a record.

This module runs in the parent and imports nothing heavy: a refusal answers within two seconds.
"""

from __future__ import annotations

import difflib
import os
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from llm_at_home.errors import Refusal, full_traceback
from llm_at_home.planning import composing
from llm_at_home.pruning import base as pruning
from llm_at_home.quantization import base
from llm_at_home.records import hashing, provenance, store, tracking
from llm_at_home.records.schema import Reading, Record
from llm_at_home.tasks import judging, plugins, resolve, sweep
from llm_at_home.tasks.process import Child, Ending

CONFIG = "config.yaml"
REFUSAL = "refusal.txt"
IN_THIS_PROCESS = {"chat": "infer", "serve": "serve"}  # modes of infer.py that need the terminal, and their modules
MAKING = "making"  # below a job's folder: the run that makes the checkpoint that the job lacks
EXIT_FAILED, EXIT_REFUSED = 1, 2
LOG_LINES = 20  # of a failed job's log in its record

# Always set, whatever is imported: gptqmodel sets the first one itself, and it moves memory figures.
CHILD_ENVIRONMENT = {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "POSSIBLE_USER_WARNINGS": "off",  # Lightning's advertisements
    "PYTHONUNBUFFERED": "1",
}


def run_stamp() -> str:
    """Names the run folders of this command: time, process id and a random part, the same for all jobs of a sweep."""
    variable = "LLM_AT_HOME_STAMP"
    if variable not in os.environ:
        os.environ[variable] = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{os.getpid()}_{secrets.token_hex(2)}"
    return os.environ[variable]


OmegaConf.register_new_resolver("run_stamp", run_stamp, replace=True)


def run(main: Callable[[], Any]) -> None:
    """Run a Hydra entry point and exit: 0 done, 1 a job failed, 2 refused."""
    try:
        plugins.check(sys.argv[1:])
        composing.check_words(sys.argv[1:])
        main()
    except Refusal as refusal:
        if full_traceback():
            raise
        print(f"refused: {refusal}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    except KeyboardInterrupt:
        sweep.print_summary()
        sys.exit(EXIT_FAILED)
    except SystemExit as error:
        if error.code != 1:
            raise
        # A sweeper that gives up ends like this too, as Optuna does where no trial has a figure.
        sweep.print_summary()
        # Hydra ends with 1 when it cannot compose: an unknown choice or key is a refusal.
        sys.exit(sweep.exit_code() or EXIT_FAILED if sweep.outcomes() else EXIT_REFUSED)
    sys.exit(sweep.exit_code())


def job(task: str, composed: DictConfig) -> float | list[float] | None:
    """Run one job from its composed configuration and return its metric or metrics, or None where one is unknown."""
    hydra = HydraConfig.get()
    is_sweep = hydra.mode is not None and hydra.mode.name == "MULTIRUN"
    folder = Path(hydra.runtime.output_dir)
    start = time.perf_counter()
    outcome = sweep.Outcome(list(hydra.overrides.task), str(folder))
    metric = None
    try:
        config = resolve.resolve(task, composed, hydra.overrides.task)
        resolve.check(task, config)
        if task == "infer" and config["mode"] in IN_THIS_PROCESS:
            getattr(resolve.task_module(IN_THIS_PROCESS[config["mode"]]), config["mode"])(config)
            outcome.status = "ok"
        elif config.get("judge", {}).get("dry_run"):
            judging.dry_run(config)
            outcome.status = "ok"
        else:
            parent = str(Path(hydra.sweep.dir).resolve()) if is_sweep else None
            outcome.status, record = run_or_skip(task, config, folder, parent)
            metric = _metric(record, config["metric"])
    except Refusal as refusal:
        if full_traceback():
            raise
        outcome.status, outcome.message = "refused", str(refusal)
        print(f"refused: {refusal}", file=sys.stderr)
    except Exception as error:
        # Of this process and not of the job's, as a full disk is: Hydra would tell it only after the last job.
        if full_traceback():
            raise
        outcome.message = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"failed: {outcome.message}\n{traceback.format_exc()}", file=sys.stderr)
    outcome.seconds = time.perf_counter() - start
    sweep.note(outcome, Path(hydra.sweep.dir) if is_sweep else None)
    if outcome.status == "interrupted":
        raise KeyboardInterrupt
    return metric


def run_or_skip(task: str, config: dict[str, Any], folder: Path, parent: str | None) -> tuple[str, Record | None]:
    """Run a resolved and checked job in a child process, unless a finished run has its hash.

    Args:
        task: the command.
        config: as :func:`resolve.resolve` gives it.
        folder: the run folder.
        parent: names the sweep that the job belongs to, for MLflow; None without one.

    Returns:
        The record's status, or ``skipped``, and the record.

    Raises:
        Refusal: where the job finds only when it has loaded something that it cannot work.
    """
    digest = hashing.config_hash(config, resolve.ingredients(task, config))
    root = Path(config["paths"]["output"])
    finished = None if config["rerun"] or _is_lost(task, config) else store.find_finished(digest, root)
    if finished is not None:
        if finished.resolve() != folder.resolve():
            store.write_json(folder / store.POINTER, {"folder": str(finished)})
        print(f"skipped: finished in {_short(finished)} (rerun=true runs it again)")
        return "skipped", store.load(finished)
    lacking = _lacking(task, config)
    if lacking is not None:
        # In a process of its own, so that neither its time nor its memory counts as the job's.
        maker, what, own = lacking
        status, making = run_or_skip(maker, own, folder / MAKING, parent=None)
        if status != "ok":
            record = Record(task, status, config, digest, provenance=provenance.collect({"seed": config["seed"]}))
            why = (making.error or {}).get("message", status) if making else status
            record.error = {"type": "NotMade", "message": f"its {what} checkpoint could not be made: {why}"}
            store.save(record, folder)
            return status, record
    if (folder / store.RECORD).is_file():
        (folder / store.RECORD).replace(folder / "record.previous.json")
    store.write_json(folder / store.JOB, {"task": task, "config_hash": digest, "sweep": parent, "config": config})
    (folder / CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.create(config)), encoding="utf-8")
    (folder / tracking.RUN).unlink(missing_ok=True)
    refusal = folder / REFUSAL
    refusal.unlink(missing_ok=True)
    command = [sys.executable, "-m", "llm_at_home.tasks.child", str(folder)]
    ending = Child(command, CHILD_ENVIRONMENT, config["timeout_s"], config["grace_s"]).run()
    if ending.code == EXIT_REFUSED and refusal.is_file():
        raise Refusal(refusal.read_text(encoding="utf-8"))
    record = _ensure_record(task, config, digest, folder, ending)
    if record.status == "ok":
        store.mark_finished(record, folder, root)
    print(sweep.headline(record, _short(folder)))
    return record.status, record


def _is_lost(task: str, config: Mapping[str, Any]) -> bool:
    """Whether the cache lacks what this command makes, though its record may say that it was made once."""
    if task == "prune":
        return pruning.needs_making(config)
    return task == "quantize" and base.needs_making(config)


def _lacking(task: str, config: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]] | None:
    """Command, kind and configuration of the making of what this job needs and the cache lacks."""
    if task != "prune" and pruning.needs_making(config):
        return "prune", "pruned", resolve.pruning_of(config)
    if task != "quantize" and base.needs_making(config):
        return "quantize", "quantized", resolve.making(config)
    return None


def _ensure_record(task: str, config: dict[str, Any], digest: str, folder: Path, ending: Ending) -> Record:
    """The record that the child left, or one that says how it died and what it had used until then."""
    told_otherwise = True  # in MLflow than in the record
    if (folder / store.RECORD).is_file():
        record = store.load(folder)
        if record.status == "ok":
            return record
        told_otherwise = ending.asked == "timed_out"
        if ending.asked == "timed_out":
            record.status = "timed_out"
            record.error = {**(record.error or {}), "message": f"stopped after timeout_s={config['timeout_s']}"}
    else:
        status = "out_of_memory" if ending.oom_killed else ending.asked or "failed"
        record = Record(task, status, config, digest, provenance=provenance.collect({"seed": config["seed"]}))
        record.error = {"type": "ProcessDied", "message": f"the job's process {ending}"}
        if ending.resident_peak is not None:
            method = "parent_sampled_high_water_mark"
            record.readings["resident_set_peak"] = Reading(ending.resident_peak, "GB", method)
    log = folder / "job.log"
    tail = log.read_text(errors="replace").splitlines()[-LOG_LINES:] if log.is_file() else []
    record.error = {**(record.error or {}), "log": tail}
    store.save(record, folder)
    if told_otherwise:
        tracking.end_left(record, folder)
    return record


def _metric(record: Record | None, wanted: str | Sequence[str] | None) -> float | list[float] | None:
    if record is None or wanted is None:
        return None
    figures: Mapping[str, Any] = {**record.readings, **record.quality}
    names = [wanted] if isinstance(wanted, str) else wanted
    for name in names:
        if name not in figures and record.status == "ok":
            close = difflib.get_close_matches(name, figures, n=3) or sorted(figures)
            print(f"metric={name} is no figure of this record, which has {', '.join(close)}", file=sys.stderr)
    values = [figures[name].value if name in figures else None for name in names]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return known[0] if isinstance(wanted, str) else known


def _short(folder: Path) -> str:
    try:
        return str(folder.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(folder)
