"""From a composed configuration to one without open questions, and to the hash of what it stands on."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import ipaddress
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llm_at_home.adapters import compatibility
from llm_at_home.adapters.attach import adapter_folder, rank_schedule
from llm_at_home.data.passages import passages_hash
from llm_at_home.data.questions import questions_hash
from llm_at_home.data.sources import data_hash
from llm_at_home.errors import Refusal
from llm_at_home.evaluation import context, fidelity, judge
from llm_at_home.hardware.device import resolve_device, resolve_dtype
from llm_at_home.hardware.present import present_gpus
from llm_at_home.models import source
from llm_at_home.models.logits import capped_logits
from llm_at_home.pruning import base as pruning
from llm_at_home.pruning import checkpoint as pruned
from llm_at_home.pruning.naming import prune_words
from llm_at_home.quantization import base
from llm_at_home.quantization.gguf import WRITTEN
from llm_at_home.records import hashing, store
from llm_at_home.tasks import harness, judging, planned
from llm_at_home.training.accumulation_schedule import accumulation_schedule

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
PRECISION = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}
# Lightning's policies and the dtype of the weights that each is meant for; a wider one may be computed in fewer bits.
PRECISIONS = {"32-true": "float32", "bf16-mixed": "bfloat16", "16-mixed": "float16", "bf16-true": "bfloat16"}
PRECISIONS_OF = {
    "float32": ("32-true", "bf16-mixed", "16-mixed"),
    "bfloat16": ("bf16-mixed", "bf16-true"),
    "float16": ("16-mixed",),
}
SYNTHETIC = "synthetic"
TRAINED_PROMPTS = ("PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig")


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
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise Refusal(f"{key}{str(error).splitlines()[0]}") from error
    if task == "evaluate":
        if config["task"] not in UNUSED:
            raise Refusal(f"task={config['task']} is unknown: choose one of {', '.join(UNUSED)}")
        config = {key: value for key, value in config.items() if key not in UNUSED[config["task"]]}
    if "adapters" in config:
        config["adapters"] = config["adapters"] or {}
    if config.get("mode") != "serve":
        config.pop("serve", None)  # its key is nothing for a record
    config["gpu"] = resolve_device(config["gpu"])
    if "dtype" in config:
        config["dtype"] = _dtype(config)
    if "model" in config:
        named = {override.lstrip("+").split("=")[0] for override in overrides}
        _name_model(config["model"], named)
        if "quant" in config:
            base.complete(config, named)
        pruning.complete(config, named)
    if config.get("questions") and config["questions"]["path"]:
        path = Path(config["questions"]["path"])
        config["questions"] |= {"source": "path", "name": path.stem}
    if "trainer" in config and config["trainer"]["precision"] is None:
        config["trainer"]["precision"] = PRECISION[config["dtype"]]
    return planned.settle(config) if "trainer" in config else config


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


def check(task: str, config: Mapping[str, Any]) -> None:
    """Refuse, before anything loads, what cannot work.

    Raises:
        Refusal: with one line that says what to change.
    """
    if config["limit"] is not None and config["limit"] < 1:
        raise Refusal(f"limit={config['limit']} leaves nothing to do: give at least 1, or null for all")
    if config.get("adapter_path"):
        adapter_folder(config["adapter_path"])
    if "model" in config:
        source.check(config["model"])
        if "quant" in config:
            base.check(config)
        pruning.check(config)
    checks = {
        "train": _check_train,
        "infer": _check_infer,
        "evaluate": _check_evaluate,
        "quantize": _check_quantize,
        "prune": _check_prune,
        "merge": _check_merge,
    }
    checks[task](config)


def _check_train(config: Mapping[str, Any]) -> None:
    _check_synthetic(config, "data")
    compatibility.check(config)
    accumulation_schedule(_accumulation(config))
    _check_precision(config)
    _check_devices(config)
    _check_memory(config)
    if "schedule" in config["adapter"]:
        rank_schedule(config["adapter"]["schedule"], config["trainer"]["max_steps"])
    if config["trainer"]["max_steps"] < 1:
        raise Refusal(f"trainer.max_steps={config['trainer']['max_steps']} is too small: give at least 1")
    if config["adapter_path"] and config["adapter"]["trains"] != "adapter":
        raise Refusal(f"adapter={config['adapter']['name']} cannot go on from adapter_path: leave out one of the two")
    resume = config["resume"]
    if resume and not any((Path(resume) / "checkpoints").glob("step_*")):
        raise Refusal(f"resume={resume} holds no checkpoint: give the folder of an interrupted training run")
    if resume:
        _check_same(config, store.load(resume).config, resume)


def _check_memory(config: Mapping[str, Any]) -> None:
    every, tokens, adapter = config["memory"]["checkpointing"], config["memory"]["loss_tokens"], config["adapter"]
    if every not in ("none", "full") and (type(every) is not int or every < 1):
        raise Refusal(f"memory.checkpointing={every} is unknown: choose none, full, or a number of layers such as 2")
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise Refusal(f"memory.loss_tokens={tokens} is too small: give at least 1, or null for all at once")
    _check_loss(config)
    if config["data"]["packing"] and str(adapter.get("_target_")).endswith(TRAINED_PROMPTS):
        raise Refusal(
            f"adapter={adapter['name']} puts what it trains before the first of the packed conversations alone: use "
            "data.packing=false, or adapter=lora"
        )
    if every != "none" and str(adapter.get("_target_")).endswith("PrefixTuningConfig"):
        raise Refusal(
            f"adapter={adapter['name']} hands its keys and values to the layers in a cache, which transformers drops "
            "where layers are recomputed: use memory.checkpointing=none, or adapter=prompt"
        )
    if config["memory"]["offload"] and every == "none":
        raise Refusal("memory.offload=true is of recomputed layers: add memory.checkpointing=full")
    if config["memory"]["offload"] and config["gpu"]["device"] == "cpu":
        raise Refusal("memory.offload=true needs a GPU to move from: use memory.offload=false")
    _check_optimizer(config)


def _check_devices(config: Mapping[str, Any]) -> None:
    trainer, gpu = config["trainer"], config["gpu"]
    devices, strategy = trainer["devices"], trainer["strategy"]
    if type(devices) is not int or devices < 1:
        raise Refusal(f"trainer.devices={devices} is no number of devices: give at least 1")
    if strategy not in ("auto", "ddp"):
        hint = "use trainer=ddp, and for less memory memory=smallest, memory.offload=true or optimizer=adamw_offload"
        raise Refusal(f"trainer.strategy={strategy} is not tried here: {hint}")
    if devices == 1:
        return
    if strategy != "ddp":
        raise Refusal(f"trainer.devices={devices} needs a strategy: use trainer=ddp trainer.devices={devices}")
    if gpu["device"] == "cuda" and devices > len(present_gpus()):
        raise Refusal(f"trainer.devices={devices}, and {len(present_gpus())} GPUs are here: give as many")
    if config["adapter"]["name"] == "adalora":
        raise Refusal("adapter=adalora hands out its ranks in one process: use trainer=default, or adapter=lora")
    if config["adapter"]["trains"] == "nothing":
        raise Refusal("adapter=none has no gradients for several processes to share: use trainer=default")
    if config["resume"]:
        raise Refusal(
            "a checkpoint has the random states of one process: resume with trainer=default, or go on from its adapter "
            "with adapter_path="
        )


def _check_loss(config: Mapping[str, Any]) -> None:
    loss, tokens = config["memory"]["loss"], config["memory"]["loss_tokens"]
    if loss not in ("torch", "liger"):
        raise Refusal(f"memory.loss={loss} is unknown: choose torch or liger")
    if loss == "liger" and tokens is not None:
        raise Refusal("memory.loss=liger chooses itself how many logits it holds: use memory.loss_tokens=null")
    if loss == "liger" and config["gpu"]["device"] == "cpu":
        raise Refusal("memory.loss=liger is a kernel for GPUs: use memory.loss=torch memory.loss_tokens=256")
    if loss == "liger" and importlib.util.find_spec("liger_kernel") is None:
        hint = "pip install liger-kernel==0.8.5, or use memory.loss=torch memory.loss_tokens=256"
        raise Refusal(f"memory.loss=liger needs liger-kernel: {hint}")
    capped = capped_logits(source.shape(config["model"]))
    if capped and (tokens is not None or loss == "liger"):
        hint = "use memory.loss_tokens=null memory.loss=torch"
        raise Refusal(f"{config['model']['name']} caps its logits after the output layer ({capped}): {hint}")


def _check_precision(config: Mapping[str, Any]) -> None:
    precision, dtype, gpu = config["trainer"]["precision"], config["dtype"], config["gpu"]
    if precision not in PRECISIONS:
        raise Refusal(f"trainer.precision={precision} is unknown: choose one of {', '.join(PRECISIONS)}")
    if precision == "16-mixed" and gpu["device"] == "cpu":
        raise Refusal(
            f"trainer.precision=16-mixed (of dtype={dtype}) needs a GPU, on a CPU Lightning would compute in bfloat16: "
            "use dtype=float32 or bfloat16"
        )
    if precision not in PRECISIONS_OF[dtype]:
        hint = f"use dtype={PRECISIONS[precision]}, or use {' or '.join(PRECISIONS_OF[dtype])}"
        raise Refusal(f"trainer.precision={precision} does not train weights of dtype={dtype}: {hint}")
    if precision.startswith("bf16"):
        resolve_dtype("bfloat16", gpu)
    if precision == "16-mixed" and dtype == "float16" and config["adapter"]["trains"] == "all":
        raise Refusal(
            f"adapter={config['adapter']['name']} dtype=float16 would train float16 weights, whose gradients no scaler "
            "takes: use dtype=float32 trainer.precision=16-mixed, or dtype=bfloat16"
        )
    if precision == "bf16-true" and config["quant"]["method"] != "dense":
        raise Refusal(
            f"trainer.precision=bf16-true would round the scales of quant={config['quant']['name']} as well: use "
            "trainer.precision=bf16-mixed"
        )


def _check_optimizer(config: Mapping[str, Any]) -> None:
    target, gpu = str(config["optimizer"]["_target_"]), config["gpu"]
    if gpu["device"] == "cpu" and "Paged" in target:
        raise Refusal(
            "a paged optimizer moves its state between card and host, and gpu=cpu has no card: use optimizer=adamw_8bit"
        )
    if gpu["device"] == "cpu" and target.endswith("HostAdamW"):
        raise Refusal(
            "optimizer=adamw_offload keeps its state in the host's memory, where gpu=cpu has all: use optimizer=adamw"
        )


def _check_same(config: Mapping[str, Any], before: Mapping[str, Any], folder: str) -> None:
    before = {"prune": {"name": "none"}, **before}  # of a run of before there was any
    for group in ("model", "quant", "prune", "adapter", "data", "optimizer", "scheduler", "dtype", "seed", "limit"):
        if config[group] != before.get(group):
            raise Refusal(f"resume={folder} was run with another {group}: give the same overrides as then")
    steps = [_accumulation(c) for c in (config, before)]
    if accumulation_schedule(steps[0]) != accumulation_schedule(steps[1]):
        raise Refusal(f"resume={folder} was run with callbacks.accumulation.steps={steps[1]}: give the same")


def _accumulation(config: Mapping[str, Any]) -> Any:
    return ((config.get("callbacks") or {}).get("accumulation") or {}).get("steps", 1)


def _check_infer(config: Mapping[str, Any]) -> None:
    if config["engine"]["name"] == "llamacpp" and config["quant"]["method"] != "gguf":
        hint = "use quant=gguf (quant.type=F16 or F32 is unquantized), or engine=eager"
        raise Refusal(f"engine=llamacpp runs .gguf files, and quant={config['quant']['name']} is none: {hint}")
    if config["mode"] not in ("bench", "chat", "serve"):
        raise Refusal(f"mode={config['mode']} is unknown: choose bench, chat or serve")
    if config["adapters"] and not (config["mode"] != "bench" and config["adapter_path"]):
        raise Refusal("adapters= is for mode=chat and mode=serve: name the first one with adapter_path=")
    for path in config["adapters"].values():
        adapter_folder(path)
    if config["repeats"] < 1:
        raise Refusal(f"repeats={config['repeats']} is too small: give at least 1")
    if config["samples"] < 1:
        raise Refusal(f"samples={config['samples']} is too small: give at least 1")
    if config["samples"] > 1 and config["engine"].get("temperature") == 0:
        raise Refusal("samples= of greedy answers would all be alike: leave out engine.temperature=0, or samples=")
    if config["engine"].get("batch_size", 1) < 1:
        raise Refusal(f"engine.batch_size={config['engine']['batch_size']} is too small: give at least 1")
    if config["mode"] != "bench" and config["model"]["weights"] == "random":
        raise Refusal(f"random weights have nothing to say: mode={config['mode']} needs model.weights=pretrained")
    if config["mode"] == "serve":
        _check_serve(config)
    _check_synthetic(config, "questions")


def _check_serve(config: Mapping[str, Any]) -> None:
    serve = config["serve"]
    if config["engine"]["name"] == "llamacpp":
        raise Refusal("mode=serve serves transformers' models: use another quant=, with engine=graph or engine=eager")
    try:
        is_loopback = ipaddress.ip_address(serve["host"]).is_loopback
    except ValueError:
        raise Refusal(f"serve.host={serve['host']} is no address: give one such as 127.0.0.1") from None
    if not is_loopback and not serve["api_key"]:
        raise Refusal(f"serve.host={serve['host']} lets everybody in the network ask: give serve.api_key as well")
    for key in ("context", "queue"):
        if serve[key] < 1:
            raise Refusal(f"serve.{key}={serve[key]} is too small: give at least 1")


def _check_quantize(config: Mapping[str, Any]) -> None:
    if not hasattr(base.method_of(config["quant"]), "ensure"):
        raise Refusal(f"quant={config['quant']['name']} is quantized while it loads: there is nothing to make")
    if config["model"]["weights"] == "random":
        raise Refusal("random weights are quantized while they load: use model.weights=pretrained")
    if source.quantized_as(config["model"]):
        raise Refusal("model.source is quantized already: there is nothing to make")


def _check_prune(config: Mapping[str, Any]) -> None:
    if not pruning.is_pruned(config):
        raise Refusal("prune=none prunes nothing: choose prune=magnitude, wanda or sparsegpt")
    if config["model"]["weights"] == "random":
        raise Refusal("random weights are pruned while they load: use model.weights=pretrained")


def _check_merge(config: Mapping[str, Any]) -> None:
    """What merging rounds away, or cannot write, is refused."""
    if config["quant"]["method"] != "dense":
        raise Refusal(
            f"merging into quant={config['quant']['name']} would round the update away: merge with quant=none, and "
            "quantize the merged model (model.source=FOLDER)"
        )
    if config["model"]["weights"] == "random":
        raise Refusal("random weights have nothing to be merged with: use model.weights=pretrained")
    trained_on = _training_config(config["adapter_path"]).get("prune", config["prune"])
    if pruned.settings(trained_on) != pruned.settings(config["prune"]):
        hint = "merge with the prune= of its training; the merged weights are dense again"
        raise Refusal(f"the adapter was trained on prune={', '.join(prune_words(trained_on)) or 'none'}: {hint}")
    if Path(config["out"]).exists():
        raise Refusal(f"out={config['out']} exists: give a folder that does not")
    if config["gguf"] and config["gguf"] not in WRITTEN:
        raise Refusal(f"gguf={config['gguf']} is not written by Python: choose one of {', '.join(WRITTEN)}")


def _training_config(adapter_path: str) -> Mapping[str, Any]:
    """The configuration of the training run that an adapter comes from; empty where its folder is no run's."""
    for folder in (Path(adapter_path), Path(adapter_path).parent):
        with contextlib.suppress(Refusal):
            return store.load(folder).config
    return {}


def _check_synthetic(config: Mapping[str, Any], group: str) -> None:
    model = config["model"]
    if config[group]["source"] != SYNTHETIC and model["weights"] == "random" and model["architecture"]:
        raise Refusal(f"{model['name']} with random weights has no tokenizer: use {group}=synthetic")


def _check_evaluate(config: Mapping[str, Any]) -> None:
    if config["task"] in ("judge", "judge_check"):
        _check_judge(config)
    elif config["model"]["weights"] == "random":
        raise Refusal("random weights have no quality to measure: use model.weights=pretrained")
    elif config["task"] == "fidelity":
        resolve_dtype(config["fidelity"]["baseline_dtype"], config["gpu"])
        fidelity.check(config)
    elif config["task"] == "harness":
        harness.check(config)
    elif config["data"]["source"] == SYNTHETIC:
        raise Refusal("data=synthetic has no answers to compare with: use data=handbook, guanaco or jsonl")
    else:
        context.check(config)


def _check_judge(config: Mapping[str, Any]) -> None:
    places = judging.answer_folders(config)
    if config["task"] == "judge" and not places:
        raise Refusal("task=judge needs answers=RUN_FOLDER, or a file of answers in FastChat's format")
    if not config.get("questions") and (not places or Path(places[0]).is_file()):
        raise Refusal("which questions? Add questions=mt_bench, or questions=home_bench")
    if config.get("questions") and config["questions"]["source"] == SYNTHETIC:
        raise Refusal("questions=synthetic are random ids, which nobody can judge: use questions=mt_bench")
    for place in (*places, config["baseline"], config.get("own_answers")):
        if not place or Path(place).is_file():
            continue
        run = store.load(place)
        if run.task != "infer":
            raise Refusal(f"answers and baseline are folders of inference runs, but one holds a {run.task} record")
        if run.config["model"]["weights"] == "random":
            raise Refusal("answers of random weights have no quality to judge: use model.weights=pretrained")
    if config["task"] == "judge":
        judge.check(config["judge"], has_baseline=bool(config["baseline"]), runs=len(places))
        return
    if bool(places) != bool(config["baseline"]) or len(places) > 1:
        raise Refusal(
            "task=judge_check compares one model under two seeds: give answers=RUN and baseline=OTHER_SEED, or neither"
        )
    if places and not judging.differ_in_seed_alone(places[0], config["baseline"]):
        raise Refusal(
            "answers and baseline are not one model under two seeds: the noise floor needs infer.py -m seed=0,1"
        )
    judge.check({**config["judge"], "mode": "single"})


def making(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of ``python -m llm_at_home.tasks.quantize`` that makes what this one needs."""
    shared = ("model", "quant", "gpu", "dtype", "seed", "limit", "timeout_s", "grace_s", "strict", "paths")
    own = {"rerun": True, "metric": None, "logger": {"name": "none"}}
    return {key: config[key] for key in shared} | own


def pruning_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of ``python -m llm_at_home.tasks.prune`` that makes what this one needs."""
    shared = ("model", "prune", "gpu", "dtype", "seed", "limit", "timeout_s", "grace_s", "strict", "paths")
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
