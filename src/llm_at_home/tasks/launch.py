"""Launches a job: resolve, refuse or skip, run it in a fresh child process, and see that it leaves a record.

This module runs in the parent and imports nothing heavy: a refusal answers within two seconds.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from llm_at_home.errors import Refusal
from llm_at_home.records import hashing, store
from llm_at_home.records.schema import Record
from llm_at_home.tasks import resolve, sweep

JOB = "job.json"
CONFIG = "config.yaml"
EXIT_FAILED, EXIT_REFUSED = 1, 2
GRACE_SECONDS = 60  # for a training run to finish its accumulation window and save

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
        main()
    except KeyboardInterrupt:
        sys.exit(EXIT_FAILED)
    except SystemExit as error:
        # Hydra ends with 1 when it cannot compose: an unknown choice or key is a refusal.
        sys.exit(EXIT_REFUSED if error.code == 1 and not sweep.outcomes() else error.code)
    sys.exit(sweep.exit_code())


def job(task: str, composed: DictConfig) -> float | None:
    """Run one job from its composed configuration and return its metric, or None where it has none."""
    hydra = HydraConfig.get()
    is_sweep = hydra.mode is not None and hydra.mode.name == "MULTIRUN"
    folder = Path(hydra.runtime.output_dir)
    start = time.perf_counter()
    outcome = sweep.Outcome(list(hydra.overrides.task), str(folder))
    metric = None
    try:
        config = resolve.resolve(task, composed, hydra.overrides.task)
        resolve.check(task, config)
        if task == "infer" and config["mode"] == "chat":
            resolve.task_module(task).chat(config)
            outcome.status = "ok"
        else:
            parent = str(Path(hydra.sweep.dir).resolve()) if is_sweep else None
            outcome.status, record = _run_or_skip(task, config, folder, parent)
            metric = _metric(record, config["metric"])
    except Refusal as refusal:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        outcome.status, outcome.message = "refused", str(refusal)
        print(f"refused: {refusal}", file=sys.stderr)
    outcome.seconds = time.perf_counter() - start
    sweep.note(outcome, Path(hydra.sweep.dir) if is_sweep else None)
    if outcome.status == "interrupted":
        raise KeyboardInterrupt
    return metric


def _run_or_skip(task: str, config: dict[str, Any], folder: Path, parent: str | None) -> tuple[str, Record | None]:
    digest = hashing.config_hash(config, resolve.ingredients(task, config))
    root = Path(config["paths"]["output"])
    finished = None if config["rerun"] else store.find_finished(digest, root)
    if finished is not None:
        if finished.resolve() != folder.resolve():
            store.write_json(folder / store.POINTER, {"folder": str(finished)})
        print(f"skipped: finished in {_short(finished)} (rerun=true runs it again)")
        return "skipped", store.load(finished)
    if (folder / store.RECORD).is_file():
        (folder / store.RECORD).replace(folder / "record.previous.json")
    store.write_json(folder / JOB, {"task": task, "config_hash": digest, "sweep": parent, "config": config})
    (folder / CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.create(config)), encoding="utf-8")
    code, ended = run_child([sys.executable, "-m", "llm_at_home.tasks.child", str(folder)], config["timeout_s"])
    if code == EXIT_REFUSED:
        raise Refusal((folder / "refusal.txt").read_text(encoding="utf-8"))
    record = _ensure_record(task, config, digest, folder, code, ended)
    if record.status == "ok":
        store.mark_finished(record, folder, root)
    print(sweep.headline(record, _short(folder)))
    return record.status, record


def run_child(command: list[str], timeout_s: float | None) -> tuple[int, str | None]:
    """Run a command in a session of its own and wait for it.

    Ctrl-C and SIGTERM are passed on to it once, with time to put its work in order; a second one, or none of that
    within the grace period, kills it and its children.

    Returns:
        Its exit code, and ``interrupted`` or ``timed_out`` where this process ended it.
    """
    asked: list[int] = []
    child: subprocess.Popen[bytes] | None = None
    deadline: float | None = None

    def ask(number: int, frame: FrameType | None = None) -> None:
        nonlocal deadline
        if child is None:
            return
        _signal_group(child, signal.SIGKILL if asked else number)
        asked.append(number)
        deadline = time.monotonic() + GRACE_SECONDS

    main_thread = threading.current_thread() is threading.main_thread()
    previous = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)} if main_thread else {}
    ended: str | None = None
    try:
        child = subprocess.Popen(command, env={**os.environ, **CHILD_ENVIRONMENT}, start_new_session=True)
        limit = time.monotonic() + timeout_s if timeout_s else None
        while child.poll() is None:
            time.sleep(0.05)
            if limit is not None and ended is None and time.monotonic() > limit:
                ended = "timed_out"
                ask(signal.SIGTERM)
            if deadline is not None and time.monotonic() > deadline:
                _signal_group(child, signal.SIGKILL)
        if asked and ended is None:
            ended = "interrupted"
        return child.returncode, ended
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if child is not None:
            _signal_group(child, signal.SIGKILL)  # whatever the child left behind


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(child.pid, number)
    except (ProcessLookupError, PermissionError):
        return


def _ensure_record(
    task: str, config: dict[str, Any], digest: str, folder: Path, code: int, ended: str | None
) -> Record:
    """The record that the child left, or one that says how it died."""
    if (folder / store.RECORD).is_file():
        record = store.load(folder)
        if ended == "timed_out" and record.status != "ok":
            record.status = ended
            store.save(record, folder)
        return record
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    if code == -signal.SIGKILL and ended is None:
        how += " (often the kernel's out-of-memory killer)"
    log = folder / "job.log"
    tail = log.read_text(errors="replace").splitlines()[-20:] if log.is_file() else []
    record = Record(
        task=task,
        status=ended or "failed",
        config=config,
        config_hash=digest,
        error={"type": "ProcessDied", "message": f"the job's process was {how}", "log": tail},
    )
    store.save(record, folder)
    return record


def _metric(record: Record | None, name: str | None) -> float | None:
    if record is None or name is None:
        return None
    figures: Mapping[str, Any] = {**record.readings, **record.quality}
    return figures[name].value if name in figures else None


def _short(folder: Path) -> str:
    try:
        return str(folder.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(folder)
