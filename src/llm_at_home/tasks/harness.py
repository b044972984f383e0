"""Tasks of lm-evaluation-harness (ARC, HellaSwag, WinoGrande, MMLU, GSM8K and others) on the model that is loaded."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.records.schema import Reading, Record
from llm_at_home.records.store import write_json

RESULTS = "harness.json"
_Z95 = 1.96


def check(config: Mapping[str, Any]) -> None:
    """Refuse what cannot work, before anything loads.

    Raises:
        Refusal: without the package, without tasks, or on an engine that is no transformers model.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise Refusal('task=harness needs lm-evaluation-harness: pip install "llm-at-home[harness]"')
    if config["engine"]["name"] == "llamacpp":
        raise Refusal("task=harness asks a transformers model: use another quant=, which brings engine=eager")
    options = config["harness"]
    if not options["tasks"]:
        raise Refusal("harness.tasks=[] names no task: give harness.tasks=[arc_easy], say")
    if options["batch_size"] < 1:
        raise Refusal(f"harness.batch_size={options['batch_size']} is too small: give at least 1")
    if options["include_path"] and not Path(options["include_path"]).is_dir():
        raise Refusal(f"harness.include_path={options['include_path']} is no folder")


def evaluate(config: Mapping[str, Any], folder: Path, record: Record) -> None:
    """Run the tasks; each metric becomes ``TASK_METRIC`` with the harness's standard error as an interval.

    ``limit`` keeps each task's first N documents; ``harness.json`` in the run folder holds all that the harness says.

    Raises:
        Refusal: for a task that the harness does not know.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from llm_at_home.quantization.base import describe_kernel
    from llm_at_home.tasks.infer import load_engine

    options = config["harness"]
    manager = TaskManager(include_path=options["include_path"])
    if unknown := [name for name in options["tasks"] if not manager.match_tasks([name])]:
        raise Refusal(f"lm-evaluation-harness knows no task {unknown[0]}: see `python -m lm_eval ls tasks`")
    engine = load_engine(config)
    record.readings |= engine.size
    model = HFLM(pretrained=engine.model, tokenizer=engine.tokenizer, batch_size=options["batch_size"])
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=list(options["tasks"]),
        num_fewshot=options["num_fewshot"],
        limit=config["limit"],
        task_manager=manager,
        apply_chat_template=options["chat_template"],
        random_seed=config["seed"],
        numpy_random_seed=config["seed"],
        torch_random_seed=config["seed"],
        fewshot_random_seed=config["seed"],
        log_samples=False,
        bootstrap_iters=1000,
    )
    record.kernel = describe_kernel(engine.model)  # a layer may choose its kernel at its first call
    record.provenance["lm_eval"] = lm_eval.__version__
    kept = {key: results[key] for key in ("results", "versions", "n-shot", "n-samples", "higher_is_better")}
    write_json(folder / RESULTS, kept)
    for task, figures in results["results"].items():
        samples = (results["n-samples"].get(task) or {}).get("effective")
        record.quality |= _readings(task, figures, samples, f"lm_eval {lm_eval.__version__}")
    record.counts["harness_tasks"] = len(results["results"])


def _readings(task: str, figures: Mapping[str, Any], samples: int | None, method: str) -> dict[str, Reading]:
    found = {}
    for name, value in figures.items():
        metric, _, filtered = name.partition(",")
        if not isinstance(value, int | float) or metric.endswith("_stderr") or metric in ("alias", "sample_len"):
            continue
        key = "_".join([task, metric] + ([filtered] if filtered not in ("", "none") else []))
        if not math.isfinite(value):
            found[key] = Reading.unknown("1", "the harness gave no finite figure", method)
            continue
        error = figures.get(f"{metric}_stderr,{filtered}")
        interval = None
        if isinstance(error, int | float) and math.isfinite(error):
            interval = (value - _Z95 * error, value + _Z95 * error)
        found[key] = Reading(float(value), "1", method, interval95=interval, n=samples)
    return found
