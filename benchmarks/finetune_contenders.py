"""Who fine-tunes in ``finetune.py``: transformers and PEFT in a plain loop, two ways, and the product's own run.

Each starts from the same saved adapter, on the same base, and sees the same conversations in the same order.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import profiled
import rows as common
import torch

from llm_at_home.metering.energy import EnergyMeter
from llm_at_home.metering.timing import now
from llm_at_home.training.callbacks.throughput import Throughput

CLIP, RATE = 0.3, 1e-4
# Steps before those that count. The default's are eight passes each; ours compiles in its first.
WARM_UP = {"default": 1, "best_documented": 2, "ours": 2}
# Micro-batch and whether layers are recomputed: the first that does not run out of memory is taken.
TRIED = {
    "default": ((1, False), (1, True)),
    "best_documented": ((8, False), (4, False), (2, False), (8, True), (4, True), (2, True), (1, True)),
}


class Steps(Throughput):
    """The product's own timing of steps, with the energy of those that count; the last one made is kept."""

    last: Steps | None = None

    def __init__(self, warmup_steps: int = 1, profile: bool = False) -> None:
        super().__init__(warmup_steps)
        self.meter: EnergyMeter | None = None
        self.profile = profile
        self.profiler: Any = None
        self.where: dict[str, Any] | None = None
        Steps.last = self

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """As the product's; the steps after the warm-up are those that are metered."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.meter is None and len(self.seconds) == self.warmup_steps:
            device = pl_module.device.type
            self.meter = EnergyMeter(device, idle_seconds=0.0)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            if self.profile:
                self.profiler = profiled.begin(device)
            self.meter.start()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop counting."""
        if self.meter is not None:
            self.meter.close()
        if self.profiler is not None:
            self.where = profiled.end(self.profiler, pl_module.device.type, len(self.measured()))


def empty() -> None:
    """Let go of what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def start(base: Any, config: dict[str, Any], folder: Path) -> None:
    """Save the adapter that every contender starts from."""
    from llm_at_home.adapters.attach import prepare_for_training

    torch.manual_seed(0)
    with common.bare(base):
        prepare_for_training(base, config["adapter"], None, config["trainer"]["max_steps"]).save_pretrained(folder)


def reference(base: Any, name: str, args: Any, config: dict[str, Any], folder: Path, steps: int) -> dict[str, Any]:
    """transformers and PEFT in a plain loop; the first micro-batch that the memory allows.

    Returns:
        ``seconds`` of each step after the warm-up, ``losses`` of all, ``joules`` a step, ``peak_gb`` and ``setting``.
    """
    why = ""
    for size, recompute in TRIED[name]:
        if args.batch % size:
            continue
        try:
            with common.bare(base):
                return _plain(base, name, size, recompute, args, config, folder, steps)
        except torch.cuda.OutOfMemoryError as error:
            why = str(error).splitlines()[0]
            error.__traceback__ = None
        empty()
    return {"reason": f"out of memory at every setting: {why}"}


def _plain(
    base: Any, name: str, size: int, recompute: bool, args: Any, config: dict[str, Any], folder: Path, steps: int
) -> dict[str, Any]:
    import peft

    from llm_at_home.adapters import methods
    from llm_at_home.tasks.train import _data

    device, warm_up = config["gpu"]["device"], WARM_UP[name]
    methods.register(methods.PEFT)
    base.requires_grad_(False)
    model = peft.PeftModel.from_pretrained(base, str(folder), is_trainable=True).train()
    ranks = model.base_model if hasattr(model.base_model, "rankallocator") else None
    if ranks is not None:
        for key, parameter in model.named_parameters():
            if ".ranknum." in key:  # AdaLoRA's constant
                parameter.requires_grad_(False)
    base.config.use_cache = False
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = {"fused": True} if name == "best_documented" else {}
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, **fused)
    data, _ = _data({**config, "data": {**config["data"], "batch_size": size}, "trainer": {"padded_lengths": None}})
    batches = _endless(data.train_dataloader())
    dtype = getattr(torch, config["dtype"])
    autocast = torch.autocast(device, dtype, enabled=dtype is not torch.float32)
    count = args.batch // size
    found: dict[str, Any] = {"seconds": [], "losses": [], "setting": f"{count} x {size}{', recomputed' * recompute}"}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = now(device)
    with EnergyMeter(device, idle_seconds=0.0) as meter:
        for step in range(warm_up + steps):
            if step == warm_up:
                meter.start()
            edge = now(device)
            summed = torch.zeros((), device=device)
            for _ in range(count):
                ids = next(batches)["input_ids"].to(device)
                with autocast:
                    # With labels PEFT adds AdaLoRA's penalty to the loss; the logits' own is what is compared.
                    output = model(input_ids=ids, labels=ids)
                (output.loss / count).backward()
                loss = output.loss.detach() if ranks is None else _cross_entropy(output.logits.detach(), ids)
                summed += loss / count
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            if ranks is not None:
                ranks.update_and_allocate(step + 1)
            optimizer.zero_grad()
            found["losses"].append(float(summed))
            end = now(device)
            if step == 0:
                found["first_step_seconds"] = end - begin
            if step >= warm_up:
                found["seconds"].append(end - edge)
        meter.stop()
    return found | _costs(meter, device, steps)


def _cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def _endless(loader: Any) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from loader


def _costs(meter: EnergyMeter, device: str, steps: int) -> dict[str, Any]:
    energy = meter.readings("step", steps)["energy_per_step"]
    peak = torch.cuda.max_memory_reserved() / 1e9 if device == "cuda" else None
    return {"joules": energy.value, "joules_reason": energy.reason, "peak_gb": peak}


def ours(
    base: Any, args: Any, config: dict[str, Any], folder: Path, steps: int, profile: bool = False
) -> dict[str, Any]:
    """The product's own training run on the base that is there, with ``trainer=fast``.

    Returns:
        As :func:`reference`, and the record's ``readings`` and ``counts``; with ``profile`` also ``where``.
    """
    from llm_at_home.quantization import base as loader
    from llm_at_home.records.schema import Record
    from llm_at_home.tasks import train
    from llm_at_home.training.callbacks import checkpoints
    from llm_at_home.training.module import CausalLMModule

    config = {**config, "adapter_path": str(folder)}
    config["trainer"] = {**config["trainer"], "max_steps": WARM_UP["ours"] + steps}
    timing = {"_target_": f"{__name__}.Steps", "warmup_steps": WARM_UP["ours"], "profile": profile}
    kept = {key: config["callbacks"][key] for key in ("accumulation", "clipping", "rank_allocation")}
    config["callbacks"] = {**kept, "throughput": timing}
    record = Record("train", config=config)
    load, save, cpu = loader.load_base, checkpoints.save_weights, CausalLMModule.cpu
    # The base is there already, adapters are not written, and Lightning leaves the base where it is when it is done.
    loader.load_base = lambda config: base  # type: ignore[assignment]
    checkpoints.save_weights = lambda model, folder: folder  # type: ignore[assignment]
    CausalLMModule.cpu = _without_base  # type: ignore[method-assign]
    begin = time.perf_counter()
    try:
        with common.bare(base), tempfile.TemporaryDirectory(prefix="finetune_") as run:
            train.run(config, Path(run), record, None)
            lines = [line.split(",") for line in (Path(run) / "metrics.csv").read_text().splitlines()]
    except torch.cuda.OutOfMemoryError as error:
        error.__traceback__ = None
        empty()
        return {"reason": str(error).splitlines()[0]}
    finally:
        loader.load_base, checkpoints.save_weights = load, save
        CausalLMModule.cpu = cpu  # type: ignore[method-assign]
    timed = Steps.last
    if timed is None or timed.meter is None or timed.first_step_end is None:
        raise RuntimeError("the run made no step after its warm-up")
    column = lines[0].index("loss")
    count = config["callbacks"]["accumulation"]["steps"]
    recomputed = config["memory"]["checkpointing"]
    return {
        "seconds": [seconds for seconds, _, _ in timed.measured()],
        "losses": [float(line[column]) for line in lines[1:]],
        "setting": f"{count} x {config['data']['batch_size']}, recomputed: {recomputed}",
        "first_step_seconds": timed.first_step_end - begin,
        "readings": {key: reading.value for key, reading in record.readings.items()},
        "counts": record.counts,
        "notes": record.notes,
        "where": timed.where,
        **_costs(timed.meter, config["gpu"]["device"], steps),
    }


def _without_base(module: Any) -> Any:
    """Take what was trained off the device: Lightning keeps the module, and the next row would find it there."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data, parameter.grad = parameter.data.cpu(), None
    return module


def apart(found: list[float], wanted: list[float]) -> float:
    """The largest relative difference of two curves of losses."""
    return max(abs(a / b - 1) for a, b in zip(found, wanted, strict=False))


def pace(rounds: list[dict[str, Any]]) -> float | None:
    """Steps a second: the median over all measured steps of all rounds."""
    seconds = [value for one in rounds for value in one.get("seconds", [])]
    return 1 / statistics.median(seconds) if seconds else None
