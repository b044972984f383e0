"""What cannot be trained, or not so."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Mapping
from typing import Any

from llm_at_home.adapters import compatibility
from llm_at_home.adapters.attach import rank_schedule
from llm_at_home.data.sources import SYNTHETIC, check_group
from llm_at_home.errors import Refusal
from llm_at_home.hardware.device import check_kernel, resolve_dtype
from llm_at_home.hardware.present import present_gpus
from llm_at_home.models import source
from llm_at_home.models.logits import capped_logits
from llm_at_home.tasks import fast
from llm_at_home.tasks.checks.resume import accumulation, check_resume
from llm_at_home.tasks.checks.synthetic import check_synthetic
from llm_at_home.tasks.checks.values import check_values
from llm_at_home.training.accumulation_schedule import accumulation_schedule
from llm_at_home.training.regional import LAYERS, OFF

# Lightning's policies and the dtype of the weights that each is meant for; a wider one may be computed in fewer bits.
PRECISIONS = {"32-true": "float32", "bf16-mixed": "bfloat16", "16-mixed": "float16", "bf16-true": "bfloat16"}
PRECISIONS_OF = {
    "float32": ("32-true", "bf16-mixed", "16-mixed"),
    "bfloat16": ("bf16-mixed", "bf16-true"),
    "float16": ("16-mixed",),
}
# Whose layers were compiled here without a cut, and what of an adapter cuts them.
COMPILED_BASES = ("dense", "bitsandbytes", "torchao")
UNCOMPILED = {
    "use_dora": "is DoRA, whose norms PEFT computes in code that cannot be compiled",
    "module_dropout": "drops whole modules at random, on which compiled code cannot branch",
}
TRAINED_PROMPTS = ("PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig")


def check(config: Mapping[str, Any]) -> None:
    """Refuse training that cannot work."""
    check_values(config)
    check_synthetic(config, "data")
    compatibility.check(config)
    _check_method(config)
    accumulation_schedule(accumulation(config))
    _check_precision(config)
    _check_devices(config)
    _check_memory(config)
    _check_compiled(config)
    if "schedule" in config["adapter"]:
        rank_schedule(config["adapter"]["schedule"], config["trainer"]["max_steps"])
    if config["held_out"] is not None and (type(config["held_out"]) is not int or config["held_out"] < 1):
        raise Refusal(f"held_out={config['held_out']} is no number of conversations: give at least 1, or null")
    if config["held_out"] and config["data"]["source"] == SYNTHETIC:
        raise Refusal("held_out needs conversations with answers, and data=synthetic is random: use held_out=null")
    check_group(config["data"], ("train", "test") if config["held_out"] else ("train",), config["seed"])
    if config["adapter_path"] and config["adapter"]["trains"] != "adapter":
        raise Refusal(f"adapter={config['adapter']['name']} cannot go on from adapter_path: leave out one of the two")
    if config["resume"]:
        check_resume(config, config["resume"])


def _check_method(config: Mapping[str, Any]) -> None:
    """Refuse what an adapter's method would change by itself, or leave undone, without an error."""
    adapter = config["adapter"]
    target = str(adapter.get("_target_"))
    if target.endswith("AdaLoraConfig"):
        if "rank_allocation" not in (config["callbacks"] or {}):
            raise Refusal(f"adapter={adapter['name']} lowers no rank without callbacks.rank_allocation: leave it in")
        if not adapter["target_r"] < adapter["init_r"]:
            ranks = f"adapter.target_r={adapter['target_r']} adapter.init_r={adapter['init_r']}"
            raise Refusal(f"{ranks} leaves no rank to lower: give a larger init_r, or use adapter=lora")
        if type(adapter["deltaT"]) is not int or adapter["deltaT"] < 1:
            raise Refusal(f"adapter.deltaT={adapter['deltaT']} is no number of steps: give at least 1")
    if target.endswith("OFTConfig") and adapter.get("target_modules") == "all-linear":
        size = adapter.get("oft_block_size")
        widths = source.widths(config["model"])
        odd = [width for width in sorted(widths) if size and width % size]
        if odd:
            hint = f"give a divisor of {math.gcd(*widths)}"
            raise Refusal(f"adapter.oft_block_size={size} does not divide layers of {odd[0]} inputs: {hint}")


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
    if precision == "16-mixed" and dtype == "float16" and config["adapter"].get("modules_to_save"):
        raise Refusal(
            "adapter.modules_to_save dtype=float16 would train copies of float16 weights, whose gradients no scaler "
            "takes: use dtype=float32 trainer.precision=16-mixed, or leave it out"
        )
    if precision == "bf16-true" and config["quant"]["method"] != "dense":
        raise Refusal(
            f"trainer.precision=bf16-true would round the scales of quant={config['quant']['name']} as well: use "
            "trainer.precision=bf16-mixed"
        )


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


def _check_compiled(config: Mapping[str, Any]) -> None:
    trainer, adapter, gpu = config["trainer"], config["adapter"], config["gpu"]
    lengths, off = trainer["padded_lengths"], "use trainer.compile=off"
    if lengths is not None and (type(lengths) is not int or lengths < 1):
        raise Refusal(f"trainer.padded_lengths={lengths} is no number of lengths: give at least 1, or null")
    if trainer["compile"] not in (fast.AUTO, LAYERS, OFF):
        raise Refusal(f"trainer.compile={trainer['compile']} is unknown: choose {fast.AUTO}, {LAYERS} or {OFF}")
    if trainer["graph"] not in (fast.AUTO, OFF):
        raise Refusal(f"trainer.graph={trainer['graph']} is unknown: choose {fast.AUTO} or {OFF}")
    if not fast.is_compiled(config):
        return
    if lengths is None:
        raise Refusal("trainer.compile=layers would compile each length anew: add trainer.padded_lengths=4")
    if adapter["trains"] == "nothing":
        raise Refusal(f"adapter={adapter['name']} trains nothing that compiling could make faster: {off}")
    if config["quant"]["method"] not in COMPILED_BASES:
        raise Refusal(f"quant={config['quant']['name']} has kernels that cut a compiled layer: {off}, or quant=nf4")
    for key, why in UNCOMPILED.items():
        if adapter.get(key):
            raise Refusal(f"adapter={adapter['name']} (adapter.{key}={adapter[key]}) {why}: {off}, or adapter=lora")
    if str(adapter.get("_target_")).endswith("PrefixTuningConfig"):
        raise Refusal(f"adapter={adapter['name']} hands each layer a cache, for which each is compiled anew: {off}")
    if config["memory"]["offload"]:
        raise Refusal(f"memory.offload=true was not tried in a compiled layer: {off}, or memory.offload=false")
    if source.shape(config["model"]).get("num_local_experts"):
        raise Refusal(f"{config['model']['name']} sends tokens to experts, which was not tried compiled: {off}")
    check_kernel(gpu, (7, 0), "compiled layers (Triton)", off)
    if gpu["device"] == "cuda" and importlib.util.find_spec("triton") is None:
        raise Refusal(f"trainer.compile=layers needs Triton, which torch for GPUs brings: install that, or {off}")
    if gpu["device"] == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise Refusal(f"trainer.compile=layers needs a C++ compiler on a CPU: apt-get install g++, or {off}")


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
