"""Every adapter on every base that can train: does it work, and does it compute what it says?

    python benchmarks/adapter_matrix.py --out results/two_core_cpu/adapter_matrix
    python benchmarks/adapter_matrix.py --table results/two_core_cpu/adapter_matrix

The model is the first two layers of the embedded one, so that a cell takes seconds. Each base is a process of its own
and leaves ``OUT/BASE.json``; a base that is there is not run again. A cell:

- is refused at composition, with its line; or
- starts as the base where its method does (``start_difference``, relative, of the logits),
- has the gradients that the same adapter has on a dense float32 copy with the base's weights read back
  (``gradient_error``, relative, of all trainable parameters, after they were moved off their start),
- trains: 20 steps on the handbook lower the loss of the batch that they began with (``loss_before``, ``loss_after``),
- is saved, and gives the same logits on a freshly loaded base (``reload_difference``),
- merges into its base (``merge_difference``), or says why not.

``--ignore-refusals`` runs the refused cells too, which shows whether their refusals are still needed.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import rows as common

from llm_at_home.errors import Refusal
from llm_at_home.records.cached import cached
from llm_at_home.records.provenance import collect

CONF = common.ROOT / "conf"
LAYERS, STEPS = 2, 20
BASES = {
    "none_float32": ["quant=none", "dtype=float32"],
    "none_bfloat16": ["quant=none", "dtype=bfloat16"],
    "int8": ["quant=int8"],
    "nf4": ["quant=nf4"],
    "nf4_nested": ["quant=nf4_nested"],
    "fp4": ["quant=fp4"],
    "gptq": ["quant=gptq"],
    "awq": ["quant=awq"],
    "int8_torchao": ["quant=int8_torchao"],
}
ADAPTERS = (
    *("lora", "rslora", "dora", "adalora", "lokr", "loha", "oft", "vera"),
    *("bottleneck", "ia3", "prompt", "prefix", "p_tuning", "layernorm", "full"),
)
# Those whose update is a product with a part that starts at zero and is small, or that have few parameters.
FAST = ("adalora", "lokr", "loha", "vera", "ia3", "prompt", "prefix", "p_tuning", "layernorm")
RATES = {name: 1e-2 for name in FAST} | {"full": 1e-4}
ROUNDED = 0.05  # above it a merged update was rounded to the grid of the base, and is no longer what was trained
MOVED = 0.02  # spread of what is added to trained parameters before gradients are compared


def slice_model() -> str:
    """The folder of the embedded model's first layers, made once."""
    from llm_at_home.models.embedded import CONVERSION, ensure_converted

    def make(folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = ensure_converted()
        model = AutoModelForCausalLM.from_pretrained(source)
        model.model.layers = model.model.layers[:LAYERS]
        model.config.num_hidden_layers = LAYERS
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:LAYERS]
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)

    return str(cached("models", {"slice_of": "smollm2_135m", "conversion": CONVERSION, "layers": LAYERS}, make))


def resolved(adapter: str, words: list[str]) -> tuple[dict[str, Any], str | None]:
    """The configuration of a cell, and the line with which it is refused, if it is."""
    from hydra import compose, initialize_config_dir

    from llm_at_home.tasks import resolve

    overrides = [
        *(
            "data=handbook",
            "data.batch_size=4",
            "data.group_by_length=true",
            "model=custom",
            f"model.source={slice_model()}",
            "model.name=smollm2_slice",
        ),
        *(f"adapter={adapter}", f"optimizer.lr={RATES.get(adapter, 1e-3)}", f"trainer.max_steps={STEPS}", "limit=160"),
        *("scheduler=constant", "gpu=cpu", "logger=none", *words),
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", overrides)
    config = resolve.resolve("train", composed, overrides)
    try:
        resolve.check("train", config)
    except Refusal as refusal:
        return config, str(refusal)
    return config, None


def cell(config: dict[str, Any], batches: Any) -> dict[str, Any]:
    """Run one cell; see the module's docstring."""
    import torch

    from llm_at_home.adapters.attach import prepare_for_training, trainable_parameters
    from llm_at_home.adapters.start import check_start, probe_logits
    from llm_at_home.quantization.base import load_base

    torch.manual_seed(0)
    adapter, ids = config["adapter"], batches.conversations[0].input_ids
    found: dict[str, Any] = {}
    base = load_base(config)
    dense = dense_copy(config, base)
    before = probe_logits(base, ids)
    model = prepare_for_training(base, adapter, steps=STEPS)
    found["trainable_parameters"] = trainable_parameters(model)
    if adapter["trains"] == "adapter" and adapter.get("starts_as_identity", True):
        found["start_difference"] = check_start(adapter, before, probe_logits(model, ids), config["dtype"]).value
    twin = prepare_for_training(dense, adapter, steps=STEPS)
    found["gradient_error"] = gradient_error(model, twin, batches)
    del twin, dense
    found["loss_before"] = first_loss(model, batches)
    train(config, model, batches)
    found["loss_after"] = first_loss(model, batches)
    found["trains"] = found["loss_after"] < found["loss_before"]
    if adapter["trains"] == "adapter":
        found |= saved_and_merged(config, model, ids)
    return found


def dense_copy(config: dict[str, Any], base: Any) -> Any:
    """The unquantized model in float32 with the weights that the base's layers multiply with.

    A linear layer applied to the identity gives its weight's transpose, whatever its format.
    """
    import torch

    from llm_at_home.models.loading import load_weights
    from llm_at_home.quantization.layers import linear_layers

    dense = load_weights(config["model"], "float32", "cpu")
    layers = dict(linear_layers(dense))
    dtype = getattr(torch, config["dtype"])
    with torch.no_grad():
        for name, layer in linear_layers(base):
            weight = layer(torch.eye(layer.in_features, dtype=dtype)).T.float()
            layers[name].weight.copy_(weight)
        kept = dict(base.named_parameters())
        for name, parameter in dense.named_parameters():
            if parameter.dim() == 1:  # AWQ folds its scales into the norms
                parameter.copy_(kept[name])
        dense.get_input_embeddings().weight.copy_(base.get_input_embeddings().weight)
    return dense


def gradient_error(model: Any, twin: Any, batches: Any) -> float:
    """The relative difference of all trained parameters' gradients on one batch, both moved off their start alike."""
    import torch

    from llm_at_home.training.module import token_loss_sum

    generator = torch.Generator().manual_seed(0)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    kept = {name: p.detach().clone() for name, p in own.items()}
    batch = first_batch(batches)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * MOVED)
            others[name].copy_(parameter)
    for network in (model.eval(), twin.eval()):
        logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        token_loss_sum(logits[:, -batch["labels"].shape[1] :], batch["labels"]).backward()
    difference = sum(float((own[n].grad.float() - others[n].grad.float()).square().sum()) for n in own)
    size = sum(float(others[n].grad.float().square().sum()) for n in own)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(kept[name])
            parameter.grad = None
    model.train()
    return (difference / size) ** 0.5


def first_batch(batches: Any) -> Any:
    """The batch that every cell begins with."""
    return next(iter(copy.deepcopy(batches.train_dataloader())))


def first_loss(model: Any, batches: Any) -> float:
    """The loss of the first batch, in nats per token."""
    import torch

    from llm_at_home.training.module import token_loss_sum

    batch = first_batch(batches)
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = token_loss_sum(logits[:, -batch["labels"].shape[1] :], batch["labels"])
    model.train()
    return float(loss) / int((batch["labels"][:, 1:] != -100).sum())


def train(config: dict[str, Any], model: Any, batches: Any) -> None:
    """Train as train.py does, without its meters."""
    from hydra.utils import instantiate

    from llm_at_home.training.callbacks.accumulation import GradientAccumulation
    from llm_at_home.training.callbacks.clipping import GradientClipping
    from llm_at_home.training.callbacks.rank_allocation import RankAllocation
    from llm_at_home.training.callbacks.step_log import StepLog
    from llm_at_home.training.module import CausalLMModule

    module = CausalLMModule(model, instantiate(config["optimizer"]), instantiate(config["scheduler"]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = instantiate(
            config["trainer"],
            accelerator="cpu",
            callbacks=[GradientAccumulation(1), GradientClipping(0.3), RankAllocation(), StepLog(Path(folder), None)],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, copy.deepcopy(batches))


def saved_and_merged(config: dict[str, Any], model: Any, ids: list[int]) -> dict[str, Any]:
    """What saving, loading and merging change, as relative differences of logits."""
    from llm_at_home.adapters.attach import attach_saved
    from llm_at_home.adapters.start import probe_logits
    from llm_at_home.quantization.base import load_base

    trained = probe_logits(model, ids)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = attach_saved(load_base(config), folder)
    found["reload_difference"] = difference(probe_logits(again, ids), trained)
    try:
        if again.active_peft_config.is_prompt_learning:
            raise ValueError("prompts have no place in the weights: serve them beside the base")
        found["merge_difference"] = difference(probe_logits(again.merge_and_unload(), ids), trained)
    except (ValueError, NotImplementedError, AttributeError, TypeError, RuntimeError) as error:
        found["merge_refused"] = " ".join(str(error).split())[:200] or type(error).__name__
    return found


def difference(one: Any, other: Any) -> float:
    """Of two sets of logits, relative."""
    return float((one - other).norm() / other.norm())


def run_base(name: str, adapters: list[str], out: Path, ignore_refusals: bool) -> int:
    """All cells of one base, in this process."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    from lightning.pytorch import seed_everything

    for logger in ("lightning.pytorch", "bitsandbytes", "bitsandbytes.autograd._functions", "gptqmodel"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    from llm_at_home.tasks.train import _data

    cells: dict[str, Any] = {}
    batches = None
    for adapter in adapters:
        seed_everything(0, verbose=False)
        config, refused = resolved(adapter, BASES[name])
        if refused and not ignore_refusals:
            cells[adapter] = {"refused": refused}
            print(f"{name:14} {adapter:11} refused: {refused}", flush=True)
            continue
        start = time.monotonic()
        try:
            batches = batches or _data(config)[0]
            cells[adapter] = cell(config, batches)
        except Exception as error:
            cells[adapter] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        if refused:
            cells[adapter]["refused"] = refused
        cells[adapter]["seconds"] = round(time.monotonic() - start, 1)
        print(f"{name:14} {adapter:11} {summary(cells[adapter])}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"base": name, "words": BASES[name], "provenance": collect(), "cells": cells}, indent=1)
    (out / f"{name}.json").write_text(text + "\n")
    return 0


def summary(found: dict[str, Any]) -> str:
    """A cell in a line."""
    if "failed" in found:
        return f"FAILED {found['failed']}"
    shown = [
        f"{key.split('_')[0]} {found[key]:.2g}"
        for key in ("start_difference", "gradient_error", "reload_difference", "merge_difference")
        if key in found
    ]
    trained = f"loss {found['loss_before']:.2f} -> {found['loss_after']:.2f}"
    return f"{trained}  {'  '.join(shown)}  {found.get('merge_refused', '')}"


def mark(found: dict[str, Any]) -> str:
    """A cell of the table: what to expect in a word."""
    if "refused" in found:
        return "refused"
    if "failed" in found:
        return "**fails**"
    if not found["trains"]:
        return "**does not learn**"
    if "merge_difference" not in found:
        return "trains"
    return "trains, merges" if found["merge_difference"] < ROUNDED else "trains, merging rounds it"


def table(folder: Path) -> str:
    """The matrix as Markdown, then the largest gradient error and merge difference of each base."""
    bases = [json.loads((folder / f"{name}.json").read_text()) for name in BASES if (folder / f"{name}.json").is_file()]
    lines = [["adapter", *(base["base"] for base in bases)]]
    lines += [[adapter, *(mark(base["cells"][adapter]) for base in bases)] for adapter in ADAPTERS]
    figures = [["largest", *(base["base"] for base in bases)]]
    for key in ("start_difference", "gradient_error", "reload_difference", "merge_difference"):
        worst = []
        for base in bases:
            values = {a: found[key] for a, found in base["cells"].items() if key in found}
            most = max(values, key=values.__getitem__, default=None)
            worst.append(common.DASH if most is None else f"{values[most]:.1e} ({most})")
        figures.append([key.replace("_", " "), *worst])
    return common.markdown(lines) + "\n\n" + common.markdown(figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="measure, and keep each base's cells in this folder")
    what.add_argument("--table", type=Path, metavar="FOLDER", help="print the table of what is in this folder")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=list(ADAPTERS))
    parser.add_argument("--ignore-refusals", action="store_true", help="run refused cells too")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return 0
    if len(args.bases) == 1:
        return run_base(args.bases[0], args.adapters, args.out, args.ignore_refusals)
    slice_model()
    failed = 0
    for name in args.bases:
        if (args.out / f"{name}.json").is_file():
            print(f"{name}: is there")
            continue
        words = [sys.executable, __file__, "--out", str(args.out), "--bases", name, "--adapters", *args.adapters]
        failed |= subprocess.run([*words, *["--ignore-refusals"] * args.ignore_refusals]).returncode
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
