"""PEFT's ``method_comparison`` results: a JSON file an experiment.

The keys are those that ``log_results`` writes and ``TrainConfig`` declares in
``method_comparison/MetaMathQA/utils.py``, and that ``preprocess`` reads in ``method_comparison/processing.py``
(huggingface/peft). Bytes there are bytes. ``load_df`` of the same file makes whole numbers of
the mean and the 99th percentile of reserved memory, the file's size and the tokens, which are null here, and of the
peak, which is null on a CPU: take those out of its ``dtype_dict`` first.
"""

from __future__ import annotations

from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.records.schema import Record

PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
# What PEFT's loader calls a base that is quantized while it loads.
_DTYPES = {"nf4": "int4", "nf4_nested": "int4", "fp4": "int4", "int8": "int8"}
# PEFT's PeftType for each configuration that conf/adapter names; a test holds it against the package, which takes
# seconds to import.
TYPES = {
    "LoraConfig": "LORA",
    "AdaLoraConfig": "ADALORA",
    "LoKrConfig": "LOKR",
    "LoHaConfig": "LOHA",
    "OFTConfig": "OFT",
    "VeraConfig": "VERA",
    "IA3Config": "IA3",
    "LNTuningConfig": "LN_TUNING",
    "PrefixTuningConfig": "PREFIX_TUNING",
    "PromptEncoderConfig": "P_TUNING",
    "PromptTuningConfig": "PROMPT_TUNING",
}
_OF_OURS = ("name", "trains", "_target_", "implementation", "starts_as_identity")
_BYTES_IN_GB = 10**9


def result(record: Record, evaluation: Record | None) -> tuple[dict[str, Any], list[str]]:
    """The result of a training run, and what stays null in it.

    Args:
        record: of a training run.
        evaluation: of ``task=text`` on it, for the accuracy; None leaves that null.

    Raises:
        Refusal: for a run of another task, a base that PEFT's comparison has no word for, or another run's evaluation.
    """
    if record.task != "train":
        raise Refusal(f"PEFT's comparison is of training runs, not of {record.task}: give such a run")
    missing = [
        "train_info.accelerator_memory_reserved_avg, _99th: only the peak is kept",
        "train_info.file_size: the adapter's file is not part of the record",
        "train_info.num_total_params: not in the record",
        "run_info.peft_branch: the installed release, no branch",
        "train_config.batch_size_eval, eval_steps, generation_kwargs: nothing is evaluated while training",
    ]
    seconds = record.provenance.get("seconds")
    return {
        "run_info": {
            "created_at": record.provenance.get("started_at"),
            "total_time": seconds,
            "experiment_name": f"{_name(record)}/{record.config['model']['name']}-{record.config_hash}",
            "peft_branch": None,
            "train_config": _train_config(record),
            "peft_config": _peft_config(record),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": None,
            "accelerator_memory_max": _accelerator_bytes(record, missing),
            "accelerator_memory_reserved_99th": None,
            "train_time": _train_time(record, missing),
            "file_size": None,
            "num_trainable_params": _whole(record, "trainable_parameters", missing),
            "num_total_params": None,
            "status": "success",
            "metrics": [_metrics(record, evaluation, missing)],
        },
        "meta_info": _meta_info(record, missing),
    }, missing


def _name(record: Record) -> str:
    return str(record.config["adapter"]["name"])


def _conversations_a_step(config: dict[str, Any]) -> int | None:
    steps = config.get("callbacks", {}).get("accumulation", {}).get("steps")
    size = config.get("data", {}).get("batch_size")
    # A schedule of accumulation has no one size.
    return size * steps if isinstance(steps, int) and isinstance(size, int) else None


def _train_config(record: Record) -> dict[str, Any]:
    config = record.config
    quant = config["quant"]["name"]
    if quant != "none" and quant not in _DTYPES:
        raise Refusal(f"PEFT's comparison has no word for a base of quant={quant}: give a run on {', '.join(_DTYPES)}")
    optimizer = {key: value for key, value in config["optimizer"].items() if not key.startswith("_")}
    return {
        "model_id": config["model"]["source"],
        "dtype": _DTYPES.get(quant, config["dtype"]),
        "max_seq_length": config["data"]["max_length"],
        "batch_size": _conversations_a_step(config),
        "batch_size_eval": None,
        "max_steps": config["trainer"]["max_steps"],
        "eval_steps": None,
        "compile": bool(record.counts.get("compiled_layers")),
        "use_gc": config.get("memory", {}).get("checkpointing", "none") != "none",
        "query_template": None,
        "seed": config["seed"],
        "grad_norm_clip": config["callbacks"].get("clipping", {}).get("max_norm", 0),
        "optimizer_type": config["optimizer"]["_target_"].rsplit(".", 1)[-1],
        "optimizer_kwargs": optimizer,
        "lr_scheduler": None,
        "use_amp": str(config["trainer"].get("precision", "")).endswith("-mixed"),
        "autocast_adapter_dtype": None,
        "generation_kwargs": None,
        "attn_implementation": (record.kernel or {}).get("attention"),
        "init_kv_cache_prefix": None,
    }


def _peft_config(record: Record) -> dict[str, Any] | None:
    """The adapter's configuration with PEFT's name of its type; None for full fine-tuning, as there."""
    adapter = record.config["adapter"]
    target = adapter.get("_target_")
    if target is None:
        return None
    own = {key: value for key, value in adapter.items() if key not in _OF_OURS}
    return {"peft_type": _peft_type(target), "base_model_name_or_path": record.config["model"]["source"], **own}


def _peft_type(target: str) -> str:
    name = target.removeprefix("peft.")
    if name not in TYPES:
        raise Refusal(
            f"{target} is none of the methods of PEFT's that are known here: give a run of {', '.join(TYPES)}"
        )
    return TYPES[name]


def _value(record: Record, name: str) -> float | None:
    reading = record.readings.get(name)
    return None if reading is None else reading.value


def _whole(record: Record, name: str, missing: list[str]) -> int | None:
    value = _value(record, name)
    if value is None:
        missing.append(f"{name}: not in the record")
    return None if value is None else round(value)


def _accelerator_bytes(record: Record, missing: list[str]) -> int | None:
    value = _value(record, "torch_reserved_peak")
    if value is None:
        missing.append("train_info.accelerator_memory_max: the run had no accelerator, or did not meter it")
    return None if value is None else round(value * _BYTES_IN_GB)


def _train_time(record: Record, missing: list[str]) -> float | None:
    """Seconds of all optimizer steps: those that were left out as warm-up, and those that the speed is of."""
    speed, warm = record.readings.get("steps_per_second"), _value(record, "warmup_time")
    if speed is None or not speed.value or speed.n is None or warm is None:
        missing.append("train_info.train_time: the record lacks warmup_time or steps_per_second")
        return None
    return warm + speed.n / speed.value


def _metrics(record: Record, evaluation: Record | None, missing: list[str]) -> dict[str, Any]:
    steps = record.counts.get("optimizer_steps")
    size = _conversations_a_step(record.config)
    accuracy = None
    if evaluation is None:
        missing.append("metrics.test accuracy: give the record of task=text on this run with --evaluation")
    else:
        accuracy = _accuracy(record, evaluation)
    missing.append("metrics.train total tokens: not in the record")
    return {
        "step": steps,
        "test accuracy": accuracy,
        "train loss": _value(record, "loss_last"),
        "train samples": steps * size if steps is not None and size is not None else None,
        "train total tokens": None,
    }


def _accuracy(record: Record, evaluation: Record) -> float | None:
    subject = (evaluation.subject or {}).get("config_hash")
    if evaluation.config.get("task") != "text" or subject != record.config_hash:
        raise Refusal("--evaluation is no task=text of this very training run: give its own")
    found = evaluation.quality.get("exact_match")
    return None if found is None else found.value


def _meta_info(record: Record, missing: list[str]) -> dict[str, Any]:
    provenance = record.provenance
    known = provenance.get("packages") or {}
    packages: dict[str, Any] = {}
    for name in PACKAGES:
        packages |= {f"{name}-version": known.get(name), f"{name}-commit-hash": None}
    missing += [f"package_info.{name}-version: not in the record" for name in PACKAGES if not known.get(name)]
    cards = provenance.get("gpu") or [{}]
    said = str(provenance.get("platform") or "")
    system = said.split("-")[0] or None
    return {
        "model_info": {"sha": record.config["model"].get("revision"), "created_at": None},
        "dataset_info": {str(record.config["data"]["name"]): {"sha": None, "created_at": None}},
        "package_info": packages,
        "system_info": {
            "system": system,
            "release": None,
            "version": said or None,
            "machine": None,
            "processor": (provenance.get("cpu") or {}).get("model"),
            "accelerator": cards[0].get("name"),
        },
        "pytorch_info": None,
    }
