"""The copy of a record in MLflow: parameters flattened and whole, readings as metrics, files as artifacts.

MLflow is a view and never the source: a failure here is reported and noted, and the run goes on.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock

from llm_at_home.records.mlflow_view import share_view
from llm_at_home.records.schema import DONE, Reading, Record
from llm_at_home.records.store import RECORD, write_json

log = logging.getLogger(__name__)

# MLflow's sqlite store takes parameters up to this length; longer ones are split over numbered keys.
PARAMETER_LENGTH = 6000
NOTE_LENGTH = 8000  # characters that MLflow takes as a tag
MORE = "\n\nThe rest is in record.json, below Artifacts."
#: In a run folder: which MLflow run is its copy, for whoever has to end it when its own process cannot.
RUN = "mlflow.json"
ARTIFACTS = ("config.yaml", RECORD, "answers.jsonl", "judgments.jsonl", "metrics.csv", "grades.csv", "tables.md")


class Tracker:
    """One MLflow run, opened at the start of a job and closed with its record.

    Args:
        tracking_uri: where MLflow keeps its runs (``sqlite:///...`` or a server).
        experiment: the MLflow experiment's name.
        run_name: the name shown in the UI.
        sweep: the sweep's folder when the job is one of a sweep; its jobs become children of one parent run.
    """

    def __init__(self, tracking_uri: str, experiment: str, run_name: str, sweep: str | None = None) -> None:
        self.uri, self.experiment, self.run_name, self.sweep = tracking_uri, experiment, run_name, sweep
        self.run_id: str | None = None
        self.problem: str | None = None
        self._client: Any = None

    def open(self, config: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Create the run and log its parameters."""
        self._guard(self._open, config, tags)

    def leave(self, folder: Path) -> None:
        """Note in the run folder which run this is, for :func:`end_left`."""
        if self.run_id:
            write_json(folder / RUN, {"tracking_uri": self.uri, "experiment": self.experiment, "run_id": self.run_id})

    def log_step(self, metrics: Mapping[str, float], step: int) -> None:
        """Log figures of one optimizer step."""
        if self.run_id and not self.problem:
            self._guard(self._log_metrics, metrics, step)

    def close(self, record: Record, folder: Path) -> None:
        """Log the record's figures and files and end the run, also after a step that failed."""
        if self.run_id:
            self._guard(self._close, record, folder)

    def discard(self) -> None:
        """Take the run back: the job was refused and leaves no record."""
        if self.run_id:
            self._guard(lambda: self._client.delete_run(self.run_id))

    def _end_left(self, run_id: str, record: Record, folder: Path) -> None:
        _set_environment()
        from mlflow.tracking import MlflowClient

        self._client, self.run_id = MlflowClient(self.uri), run_id
        self._close(record, folder)

    def _guard(self, action: Any, *args: Any) -> None:
        try:
            action(*args)
        except Exception as error:
            self.problem = f"MLflow: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            log.warning("the run goes on without its copy in MLflow (%s)", self.problem)

    def _open(self, config: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        _set_environment()
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        with _store_lock(self.uri), _sweep_lock(self.sweep):
            self._client = MlflowClient(self.uri)
            experiment_id = self._experiment_id()
            parent = self._parent_run(experiment_id) if self.sweep else None
        all_tags = {**tags, "mlflow.runName": self.run_name}
        if parent:
            all_tags["mlflow.parentRunId"] = parent
        self.run_id = self._client.create_run(experiment_id, tags=all_tags).info.run_id
        params = [Param(key, value) for key, value in flatten(config).items()]
        for i in range(0, len(params), 100):
            self._client.log_batch(self.run_id, params=params[i : i + 100])

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self.experiment)
        if found:
            return found.experiment_id
        location = None
        if self.uri.startswith("sqlite:///"):
            location = (Path(self.uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()
        try:
            made = self._client.create_experiment(self.experiment, artifact_location=location)
            share_view(self._client, made)
            return made
        except Exception:
            # A server may have been asked by another job in between.
            found = self._client.get_experiment_by_name(self.experiment)
            if found is None:
                raise
            return found.experiment_id

    def _parent_run(self, experiment_id: str) -> str:
        tag = "llm_at_home.sweep"
        quote = '"' if "'" in str(self.sweep) else "'"
        found = self._client.search_runs([experiment_id], f"tags.`{tag}` = {quote}{self.sweep}{quote}", max_results=1)
        if found:
            return found[0].info.run_id
        name = f"sweep {Path(str(self.sweep)).name}"
        run = self._client.create_run(experiment_id, tags={tag: str(self.sweep), "mlflow.runName": name})
        self._client.set_terminated(run.info.run_id)
        return run.info.run_id

    def _log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        import time

        from mlflow.entities import Metric

        stamp = int(time.time() * 1000)
        # MLflow would store infinity as 1.8e308, which looks like a figure.
        infinite = {_metric_name(key): value for key, value in metrics.items() if math.isinf(value)}
        for name, value in infinite.items():
            self._client.set_tag(self.run_id, f"infinite.{name}", f"{value} at step {step}")
        kept = {_metric_name(key): value for key, value in metrics.items() if not math.isinf(value)}
        if kept:
            self._client.log_batch(self.run_id, metrics=[Metric(name, v, stamp, step) for name, v in kept.items()])

    def _close(self, record: Record, folder: Path) -> None:
        figures = {**record.readings, **record.quality}
        known = {name: reading.value for name, reading in figures.items() if reading.value is not None}
        self._log_metrics({**known, **{f"count_{k}": float(v) for k, v in record.counts.items()}}, 0)
        self._client.set_tag(self.run_id, "mlflow.note.content", described(figures))
        self._client.set_tag(self.run_id, "status", record.status)
        self._client.set_tag(self.run_id, "config_hash", record.config_hash)
        for name in ARTIFACTS:
            if (folder / name).is_file():
                self._client.log_artifact(self.run_id, str(folder / name))
        self._client.set_terminated(self.run_id, "FINISHED" if record.status == "ok" else "FAILED")
        parent = self._client.get_run(self.run_id).data.tags.get("mlflow.parentRunId")
        if parent and record.status not in DONE:
            # Folded, a sweep shows this status alone.
            self._client.set_terminated(parent, "FAILED")


def described(figures: Mapping[str, Reading]) -> str:
    """What MLflow's metrics cannot hold, for the run's description: each figure's unit, and why one is unknown."""
    lines = ["| figure | value | unit | method, or why unknown |", "| --- | --- | --- | --- |"]
    room = NOTE_LENGTH - sum(len(line) + 1 for line in lines) - len(MORE)
    for name, reading in figures.items():
        value, how = ("–", reading.reason) if reading.value is None else (f"{reading.value:.4g}", reading.method)
        cells = [str(cell or "").replace("|", "\\|").replace("\n", " ") for cell in (name, value, reading.unit, how)]
        line = f"| {' | '.join(cells)} |"
        room -= len(line) + 1
        if room < 0:
            return "\n".join(lines) + MORE
        lines.append(line)
    return "\n".join(lines)


def end_left(record: Record, folder: Path) -> None:
    """End the MLflow run of a job whose process died, or ended otherwise than it thought, as its record says."""
    if not (folder / RUN).is_file():
        return
    left = json.loads((folder / RUN).read_text(encoding="utf-8"))
    tracker = Tracker(left["tracking_uri"], left["experiment"], "")
    tracker._guard(tracker._end_left, left["run_id"], record, folder)


def _set_environment() -> None:
    """Before mlflow is imported, whose process this may be alone."""
    # A dead server should cost seconds and not minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # Nothing of a private model's runs goes to anybody.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")


def _metric_name(name: str) -> str:
    return re.sub(r"[^\w/ .-]", "_", name)


def _sweep_lock(sweep: str | None) -> Any:
    """A lock in the sweep's folder, which all its jobs see, also on other machines: its parent run is made once."""
    return FileLock(Path(sweep) / "mlflow.lock", timeout=120) if sweep and Path(sweep).is_dir() else nullcontext()


def _store_lock(uri: str) -> Any:
    """A lock while a sqlite store may be created: several processes that create it together crash."""
    if not uri.startswith("sqlite:///"):
        return nullcontext()
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock", timeout=120)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"a": {"b": 1}}`` as ``{"a.b": "1"}``; a value too long for one parameter is split, none is cut."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
            continue
        text = str(value)
        parts = [text[i : i + PARAMETER_LENGTH] for i in range(0, len(text), PARAMETER_LENGTH)] or [""]
        if len(parts) == 1:
            flat[name] = parts[0]
        else:
            flat |= {f"{name}.part{i}": part for i, part in enumerate(parts)}
    return flat
