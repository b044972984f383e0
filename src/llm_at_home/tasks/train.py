"""Fine-tuning, from data and base model to a saved adapter and a record."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from llm_at_home.data.sources import SYNTHETIC
from llm_at_home.errors import Refusal
from llm_at_home.hardware.device import runs_triton
from llm_at_home.records.schema import Reading, Record
from llm_at_home.records.tracking import Tracker
from llm_at_home.tasks import fast, helper
from llm_at_home.tasks.checks.train import PRECISIONS
from llm_at_home.tasks.planned import predicted


def run(config: dict[str, Any], folder: Path, record: Record, tracker: Tracker | None) -> None:
    """Train what ``adapter=`` says and fill ``record`` with what it cost and how the loss went.

    Args:
        config: a resolved configuration of ``conf/train.yaml``.
        folder: the run folder; ``adapter/`` (or ``model/``), ``checkpoints/`` and ``metrics.csv`` are written there.
        record: filled in as the run goes, so that a failed one still tells what it knew.
        tracker: MLflow, or None.
    """
    start = time.perf_counter()
    from lightning.pytorch import seed_everything

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # which importing it sets to INFO
    seed_everything(config["seed"], verbose=False)
    helper.use_own_device(config)
    record.readings |= predicted(config)
    callbacks = _callbacks(config, folder, tracker)
    try:
        _fit(config, folder, record, callbacks)
    finally:
        _read(record, callbacks)
        _first_step(record, callbacks, start)


def _fit(config: Mapping[str, Any], folder: Path, record: Record, callbacks: list[Any]) -> None:
    from hydra.utils import instantiate
    from lightning.pytorch.plugins.environments import LightningEnvironment

    from llm_at_home.adapters.attach import prepare_for_training, trainable_parameters
    from llm_at_home.adapters.start import check_start, probe_logits
    from llm_at_home.metering.matmul import dense_peak
    from llm_at_home.models.loading import has_tokenizer, load_tokenizer
    from llm_at_home.pruning.base import load_base
    from llm_at_home.quantization.base import describe_kernel
    from llm_at_home.training.activations import ChunkedLoss, checkpoint_layers
    from llm_at_home.training.callbacks.checkpoints import last_checkpoint, save_weights
    from llm_at_home.training.callbacks.memory import PeakMemory
    from llm_at_home.training.flops import ModelFlops
    from llm_at_home.training.module import CausalLMModule, token_loss_sum
    from llm_at_home.training.probes import check_head, check_packing, check_unmasked
    from llm_at_home.training.regional import CompiledLayers

    if not helper.is_helper():
        peak = dense_peak(config["gpu"]["device"], PRECISIONS[config["trainer"]["precision"]])
        record.readings["dense_peak"] = peak
    for callback in callbacks:
        if isinstance(callback, PeakMemory):
            callback.before_load(config["gpu"]["device"])
    data, record.counts = _data(config)

    start = time.perf_counter()
    base = load_base(config)
    record.readings["load_time"] = Reading(time.perf_counter() - start, "s", "clock")
    record.kernel = describe_kernel(base)
    adapter = config["adapter"]
    fresh = adapter["trains"] == "adapter" and not config["adapter_path"] and adapter.get("starts_as_identity", True)
    ids = data.conversations[0].input_ids
    before = probe_logits(base, ids) if fresh else None
    model = prepare_for_training(base, adapter, config["adapter_path"], config["trainer"]["max_steps"])
    if fresh:
        difference = check_start(adapter, before, probe_logits(model, ids), config["dtype"])
        record.readings["start_difference"] = difference
    record.readings["trainable_parameters"] = Reading(float(trainable_parameters(model)), "1", "counted")

    memory = config["memory"]
    if config["data"]["packing"]:
        check_packing(model, ids, config["dtype"])
    elif config["trainer"]["padded_lengths"]:
        check_unmasked(model, ids, config["dtype"])
    captured = config["trainer"]["graph"] == fast.AUTO
    if captured and (why := fast.graph_obstacle(config) or _redrawn(memory, model, ids)):
        captured = False
        record.notes.append(f"no CUDA graph of the passes: {why}")
    loss = None
    if memory["loss"] == "liger" or memory["loss_tokens"]:
        loss = ChunkedLoss(model, memory["loss_tokens"], captured)
        check_head(model, loss, ids, config["dtype"])
    recomputed = checkpoint_layers(model, memory["checkpointing"], memory["offload"], captured)
    record.counts["recomputed_layers"] = recomputed
    flops = ModelFlops.of(model)
    compiled = token_loss = None
    if fast.is_compiled(config):
        shapes = config["trainer"]["padded_lengths"]
        compiled = CompiledLayers(model, shapes, config["trainer"]["devices"])
        token_loss = compiled.function(token_loss_sum)
    elif config["trainer"]["compile"] == fast.AUTO:
        record.notes.append(f"no compiled layers: {fast.compile_obstacle(config)}")
    optimizer, scheduler = instantiate(config["optimizer"]), instantiate(config["scheduler"])
    module = CausalLMModule(model, optimizer, scheduler, loss, token_loss)
    graphed = module.graph_passes() if captured else None
    processes = config["trainer"]["devices"]
    if processes > 1:
        record.notes.append(f"memory, speed and energy are those of the first of {processes} processes")
    trainer = instantiate(
        fast.lightning_options(config["trainer"]),
        accelerator={"cpu": "cpu", "cuda": "gpu"}[config["gpu"]["device"]],
        plugins=[LightningEnvironment()] if processes > 1 else None,
        callbacks=callbacks,
        default_root_dir=str(folder),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    checkpoint = last_checkpoint(Path(config["resume"])) if config["resume"] else None
    if checkpoint:
        record.notes.append(f"resumed from {checkpoint}")
    try:
        # The checkpoint is this program's own and holds more than tensors (random states, loop positions).
        with _read_back(config, base.device, captured, record):
            trainer.fit(module, data, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=False)
    finally:
        _losses(record, module.history)
        _utilisation(record, flops, callbacks, adapter["trains"] != "nothing")
        if graphed is not None:
            graphed.close()
            record.counts |= graphed.counts()
            record.notes += graphed.notes()
        if compiled is not None:
            compiled.end()
            record.counts |= compiled.counts()
            record.readings |= compiled.readings()
            record.notes += compiled.notes()
    if adapter["trains"] != "nothing" and trainer.is_global_zero:
        saved = save_weights(model, folder)
        if adapter["trains"] == "all" and has_tokenizer(config["model"]):
            load_tokenizer(config["model"]).save_pretrained(saved)  # so that model.source= reads it as it is
    if config["held_out"] and trainer.is_global_zero:
        record.quality["perplexity_test"] = _held_out(config, model)


def _redrawn(memory: Mapping[str, Any], model: Any, ids: list[int]) -> str | None:
    """Why what is recomputed cannot be captured, where it has to draw the same numbers again."""
    from llm_at_home.training.probes import draws_numbers

    recomputes = memory["checkpointing"] != "none" or memory["loss_tokens"]
    return "what is recomputed puts random states back" if recomputes and draws_numbers(model, ids) else None


def _read_back(config: Mapping[str, Any], device: Any, captured: bool, record: Record) -> AbstractContextManager[None]:
    """Within passes that are graphs, nf4 weights are read back by this project's kernel, where it runs."""
    of_nf4 = (config["quant"].get("config") or {}).get("bnb_4bit_quant_type") == "nf4"
    if not (captured and of_nf4 and runs_triton(device)):
        return nullcontext()
    from llm_at_home.quantization.nf4_kernel import in_place_of_bitsandbytes_own

    record.kernel = {**(record.kernel or {}), "nf4_read_back": "triton"}
    return in_place_of_bitsandbytes_own()


def _held_out(config: Mapping[str, Any], model: Any) -> Reading:
    """Perplexity on the first conversations of the test split, none of which was trained on."""
    from llm_at_home.data.sources import load_group
    from llm_at_home.evaluation.perplexity import conversation_perplexity
    from llm_at_home.models.loading import load_tokenizer

    loaded = load_group(config["data"], "test", config["held_out"], config["seed"])
    messages = [conversation.messages for conversation in loaded.conversations]
    return conversation_perplexity(model.eval(), load_tokenizer(config["model"]), messages)


def _callbacks(config: Mapping[str, Any], folder: Path, tracker: Tracker | None) -> list[Any]:
    """The configured callbacks with the step log among them.

    It comes right after the one that times steps, so that writing the log is no part of a step's time, and before
    those that show or save what it closed. A helper measures and shows nothing.
    """
    from hydra.utils import instantiate

    from llm_at_home.training.callbacks.memory import PeakMemory
    from llm_at_home.training.callbacks.power import PowerMeter
    from llm_at_home.training.callbacks.progress import Progress
    from llm_at_home.training.callbacks.step_log import StepLog
    from llm_at_home.training.callbacks.throughput import Throughput

    callbacks = [instantiate(options) for options in (config["callbacks"] or {}).values()]
    if helper.is_helper():
        alone = (Throughput, PowerMeter, PeakMemory, Progress)
        return [StepLog(None, None), *(callback for callback in callbacks if not isinstance(callback, alone))]
    timing = [callback for callback in callbacks if isinstance(callback, Throughput)]
    others = [callback for callback in callbacks if not isinstance(callback, Throughput)]
    return [*timing, StepLog(folder, tracker), *others]


def _data(config: Mapping[str, Any]) -> tuple[Any, dict[str, int]]:
    """The data module, and how many conversations were truncated, dropped or unreadable."""
    from llm_at_home.training.data import ChatDataModule

    conversations, pad_id, bad_lines = _encoded(config)
    try:
        options = config["data"]
        order: dict[str, Any] = {key: options[key] for key in ("group_by_length", "packing")}
        order["shapes"] = fast.shapes(config)
        data = ChatDataModule(conversations, options["batch_size"], pad_id, config["seed"], **order)
    except ValueError as error:
        raise Refusal(f"data={config['data']['name']}: {error}") from error
    return data, {**data.counts, "bad_lines": bad_lines}


def _encoded(config: Mapping[str, Any]) -> tuple[Sequence[Any], int, int]:
    """Encoded conversations, the padding token's id, and the number of lines that could not be read."""
    from llm_at_home.data.sources import load_group
    from llm_at_home.models.chat import encode
    from llm_at_home.models.loading import load_config, load_tokenizer
    from llm_at_home.training.data import random_conversations

    options = config["data"]
    if options["source"] == SYNTHETIC:
        vocabulary = load_config(config["model"]).vocab_size
        count = config["limit"] or options["conversations"]
        return random_conversations(count, options["max_length"], vocabulary, config["seed"]), 0, 0
    loaded = load_group(options, "train", config["limit"], config["seed"])
    for line in loaded.bad_lines:
        print(f"left out: {line}")
    tokenizer = load_tokenizer(config["model"])
    encoded = [encode(tokenizer, c.messages, options["max_length"]) for c in loaded.conversations]
    return encoded, tokenizer.pad_token_id, len(loaded.bad_lines)


def _throughput(callbacks: Sequence[Any]) -> Any:
    """The callback that times steps, or None where the user has left it out."""
    from llm_at_home.training.callbacks.throughput import Throughput

    return next((one for one in callbacks if isinstance(one, Throughput)), None)


def _utilisation(record: Record, flops: Any, callbacks: Sequence[Any], backward: bool) -> None:
    from llm_at_home.training.flops import utilisation

    timed = _throughput(callbacks)
    if timed is not None:
        measured = timed.measured()
        made = [flops.of_tokens(tokens, pairs, backward) for _, tokens, pairs in measured]
        seconds = [second for second, _, _ in measured]
        record.readings["model_flop_utilisation"] = utilisation(made, seconds, record.readings.get("dense_peak"))


def _first_step(record: Record, callbacks: Sequence[Any], start: float) -> None:
    """``time_to_first_step``: from the task's beginning to the end of the first optimizer step, compiling included."""
    timed = _throughput(callbacks)
    if timed is not None:
        end = timed.first_step_end
        record.readings["time_to_first_step"] = (
            Reading(end - start, "s", "synchronized_clock")
            if end
            else Reading.unknown("s", "the run made no optimizer step")
        )


def _losses(record: Record, history: Sequence[Mapping[str, float]]) -> None:
    record.counts["optimizer_steps"] = len(history)
    if history:
        record.quality["loss_first"] = _loss(history[0]["loss"])
        record.quality["loss_last"] = _loss(history[-1]["loss"])


def _loss(value: float) -> Reading:
    if not math.isfinite(value):
        return Reading.unknown("nats/token", f"the loss is {value}")
    return Reading(value, "nats/token", "mean_over_tokens_of_the_step", n=1)


def _read(record: Record, callbacks: Sequence[Any]) -> None:
    """Collect what the callbacks measured, also after a run that failed."""
    for callback in callbacks:
        if hasattr(callback, "readings"):
            record.readings |= callback.readings()
        if hasattr(callback, "adapter_facts"):
            record.adapter = {**(record.adapter or {}), **callback.adapter_facts()} or None
        record.notes += getattr(callback, "flags", [])
        if hasattr(callback, "close"):
            callback.close()
