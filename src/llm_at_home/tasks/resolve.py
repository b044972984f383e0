"""From a composed configuration to one without open questions, and to the hash of what it stands on."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from llm_at_home.adapters import saved
from llm_at_home.adapters.attach import adapter_folder
from llm_at_home.data.passages import passages_hash
from llm_at_home.data.questions import questions_hash
from llm_at_home.data.sources import SYNTHETIC, data_hash
from llm_at_home.errors import Refusal
from llm_at_home.evaluation import context
from llm_at_home.generation import automatic
from llm_at_home.hardware.device import resolve_device, resolve_dtype
from llm_at_home.models import source
from llm_at_home.pruning import base as pruning
from llm_at_home.pruning import checkpoint as pruned
from llm_at_home.quantization import base
from llm_at_home.records import hashing
from llm_at_home.tasks import fast, judging, planned
from llm_at_home.tasks.checks import check as check  # what is resolved is checked next

# Which groups an evaluation does not use, by its task; they would only say something untrue in its record.
_OF_A_MODEL = ("model", "quant", "prune", "engine", "dtype", "adapter_path")
_OF_A_JUDGE = ("judge", "answers", "baseline", "questions", "own_answers")
UNUSED = {
    "judge": (*_OF_A_MODEL, "data", "text", "fidelity", "harness", "own_answers"),
    "judge_check": (*_OF_A_MODEL, "data", "text", "fidelity", "harness"),
    "text": (*_OF_A_JUDGE, "fidelity", "harness"),
    "fidelity": (*_OF_A_JUDGE, "data", "engine", "text", "adapter_path", "harness"),
    "harness": (*_OF_A_JUDGE, "data", "text", "fidelity"),
}
TRAINED_WITH = ("model", "quant", "adapter", "data", "gpu", "trainer", "optimizer", "memory")
PRECISION = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}


def resolve(task: str, composed: DictConfig, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration as plain values: interpolations resolved, ``auto`` decided, names made true.

    Args:
        task: ``train``, ``infer``, ``evaluate``, ``quantize``, ``prune`` or ``merge``.
        composed: what Hydra composed.
        overrides: the command line's overrides, to see what the user named.

    Raises:
        Refusal: for missing values and choices that do not exist.
    """
    try:
        container: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        config: dict[str, Any] = container
    except MissingMandatoryValue as error:
        raise Refusal(f"{error.full_key} has no value: give {error.full_key}=") from error
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise Refusal(f"{key}{str(error).splitlines()[0]}") from error
    if task == "train":
        _refuse_missing(config)
        config = {"scheduler": None, "callbacks": None, **config}  # which ~scheduler and ~callbacks leave out
    if task == "evaluate":
        if config["task"] not in UNUSED:
            raise Refusal(f"task={config['task']} is unknown: choose one of {', '.join(UNUSED)}")
        config = {key: value for key, value in config.items() if key not in UNUSED[config["task"]]}
    if "adapters" in config:
        config["adapters"] = config["adapters"] or {}
    if config.get("mode") != "serve":
        config.pop("serve", None)  # its key is nothing for a record
    config["gpu"] = resolve_device(config["gpu"])
    if config.get("engine", {}).get("name") == "auto":
        config["engine"] = automatic.engine_for(config["gpu"]["device"], config["engine"])
    if "dtype" in config:
        config["dtype"] = _dtype(config)
    if "model" in config:
        named = {override.lstrip("+").split("=")[0] for override in overrides}
        _name_model(config["model"], named)
        if "quant" in config:
            base.complete(config, named)
        pruning.complete(config, named)
        if task == "train":
            saved.complete(config, named)
    if config.get("questions") and config["questions"]["path"]:
        path = Path(config["questions"]["path"])
        config["questions"] |= {"source": "path", "name": path.stem}
    if "trainer" in config and config["trainer"]["precision"] is None:
        config["trainer"]["precision"] = PRECISION[config["dtype"]]
    return planned.settle(fast.settle(config)) if "trainer" in config else config


def _refuse_missing(config: Mapping[str, Any]) -> None:
    for group in TRAINED_WITH:
        if not isinstance(config.get(group), Mapping):
            raise Refusal(f"{group}= is missing, without which nothing trains: choose one of conf/{group}")


def _dtype(config: Mapping[str, Any]) -> str:
    """What ``dtype=`` means here: ``auto`` is the device's own, or the first that the quantization's kernels take."""
    dtype = resolve_dtype(config["dtype"], config["gpu"])
    taken = config.get("quant", {}).get("dtypes")
    if config["dtype"] != "auto" or not taken or dtype in taken:
        return dtype
    return next((one for one in taken if _is_possible(one, config["gpu"])), dtype)


def _is_possible(dtype: str, gpu: Mapping[str, Any]) -> bool:
    try:
        return resolve_dtype(dtype, gpu) == dtype
    except Refusal:
        return False


def _name_model(model: dict[str, Any], named: Collection[str]) -> None:
    """A source given on the command line is another model than the group's: neither its name nor its shape apply."""
    if "model.source" in named:
        if "model.name" not in named:
            model["name"] = None
        if not any(name.startswith("model.architecture") for name in named):
            model["architecture"] = None
    if model["name"] is None:
        model["name"] = Path(model["source"]).name


def making(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of ``python -m llm_at_home.tasks.quantize`` that makes what this one needs."""
    return _making(config, "quant")


def pruning_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of ``python -m llm_at_home.tasks.prune`` that makes what this one needs."""
    return _making(config, "prune")


def _making(config: Mapping[str, Any], group: str) -> dict[str, Any]:
    shared = ("model", group, "gpu", "dtype", "seed", "limit", "timeout_s", "grace_s", "strict", "paths")
    own = {"rerun": True, "metric": None, "logger": {"name": "none"}}
    return {key: config[key] for key in shared} | own


def ingredients(task: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Content hashes of what the configuration names by path or name, package versions, and the GPU.

    Raises:
        Refusal: for a data file, question file or run folder that cannot be read.
    """
    found: dict[str, Any] = {"task": task, "packages": hashing.package_versions(), "gpu": config["gpu"]["card"]}
    if "model" in config:
        found["model"] = source.identity(config["model"])
    if config.get("quant", {}).get("path"):
        found["quant"] = source.identity({**config["model"], "source": config["quant"]["path"]})
    if pruning.is_pruned(config) and "model" in config:
        found["pruning"] = {"version": pruned.VERSION, "calibration": pruned.calibration(config)}
    data = config.get("data")
    if data and data["source"] != SYNTHETIC:
        found["data"] = data_hash(data["source"], path=data["path"], test_path=data["test_path"])
    if "judge" in config:
        found |= judging.ingredients(config)
    questions = config.get("questions")
    if questions and questions["source"] != SYNTHETIC:
        found["questions"] = questions_hash(
            questions["source"], path=questions["path"], references=questions["references"] or "gpt-4"
        )
    if config.get("adapter_path"):
        folder = adapter_folder(config["adapter_path"])
        found["adapter"] = hashing.folder_hash(folder, ["adapter_config.json", "*.safetensors"])
    if config.get("text", {}).get("context", context.NONE) != context.NONE:
        found["context"] = passages_hash(config["data"]["source"], config["text"]["context_path"])
        found["packages"] |= hashing.package_versions(["bm25s"])
    if "fidelity" in config:
        from llm_at_home.data.texts import texts_hash

        found["texts"] = texts_hash("held_out")
        if config["fidelity"]["baseline_source"]:
            named = {**config["model"], "source": config["fidelity"]["baseline_source"]}
            found["baseline_model"] = source.identity(named)
    if config.get("task") in ("fidelity", "text"):
        found["home_bench"] = questions_hash("home_bench")
    return found


def task_module(task: str) -> Any:
    """The module with the story of this task."""
    return importlib.import_module(f"llm_at_home.tasks.{task}")
