"""Inference, from a model and questions to answers and what each token cost; a chat in the terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_at_home.data.sources import SYNTHETIC
from llm_at_home.pruning.naming import prune_words
from llm_at_home.records.schema import Reading, Record
from llm_at_home.records.tracking import Tracker
from llm_at_home.tasks import logs
from llm_at_home.tasks.turns import QuestionTurns, RandomTurns, ask, has_places


def run(config: dict[str, Any], folder: Path, record: Record, tracker: Tracker | None) -> None:
    """Answer every question in both turns and fill ``record`` with speed, memory and energy.

    Args:
        config: a resolved configuration of ``conf/infer.yaml``.
        folder: the run folder; ``answers.jsonl`` is written there, an answer a line, in FastChat's fields.
        record: filled in as the run goes.
        tracker: MLflow, or None.
    """
    from llm_at_home.metering.memory import MemoryMeter

    with MemoryMeter(config["gpu"]["device"]) as memory:
        try:
            _measure(config, folder, record, memory)
        finally:
            record.readings |= memory.readings()


def _measure(config: Mapping[str, Any], folder: Path, record: Record, memory: Any) -> None:
    from llm_at_home.generation.speed import speed_readings
    from llm_at_home.metering.energy import EnergyMeter

    start = time.perf_counter()
    engine = load_engine(config)
    record.readings["load_time"] = Reading(time.perf_counter() - start, "s", "clock")
    record.kernel = engine.kernel
    record.readings |= engine.size
    turns = _turns(config, engine, record.config_hash)
    record.readings["warmup_time"] = _warm_up(engine, turns)
    record.kernel = engine.describe()  # a layer may choose its kernel at its first call

    resume = not config["rerun"]
    with EnergyMeter(config["gpu"]["device"]) as energy:
        energy.measure_idle()
        memory.begin_measured()
        energy.start()
        start = time.perf_counter()
        try:
            passes = [_pass(turns, engine, folder, repeat, resume) for repeat in range(config["repeats"])]
            seconds = time.perf_counter() - start
        finally:
            energy.stop()
        replies = [reply for one in passes for batch in one for reply in batch]
        generated = sum(len(reply.tokens) for reply in replies)
        record.readings |= energy.readings("token", generated)
        record.notes += energy.flags
    record.readings["measured_time"] = Reading(seconds, "s", "clock", n=len(passes))
    record.readings["output_tokens_per_second"] = Reading(generated / seconds, "tokens/s", "clock", n=len(passes))
    record.readings |= speed_readings(passes)
    if turns.kept:
        record.counts["questions_kept"] = turns.kept
        record.notes.append(
            f"{turns.kept} questions were answered before this run was interrupted; its figures are of the others"
        )
    record.notes += _smaller_batches(passes[0], turns.batch_size) + _too_long(replies, engine)
    record.counts |= {
        "batches": sum(len(one) for one in passes),
        "turns": len(replies),
        "prompt_tokens": sum(reply.prompt_tokens for reply in replies),
        "generated_tokens": generated,
        "answers_at_the_length_limit": sum(reply.finish_reason == "length" for reply in replies),
    }


def _pass(turns: QuestionTurns | RandomTurns, engine: Any, folder: Path, repeat: int, resume: bool) -> Any:
    """All answers once, as if nothing had been asked before: what an earlier pass has read is read again."""
    if hasattr(engine, "forget"):
        engine.forget()
    return turns.answer(engine, folder, repeat, resume)


def chat(config: dict[str, Any]) -> None:
    """Talk to the model in this process, whose terminal it needs."""
    from llm_at_home.adapters.attach import add_saved
    from llm_at_home.generation.chat import Chat

    logs.set_up(logging.NullHandler())
    engine = load_engine(config)
    for name, path in config["adapters"].items():
        add_saved(engine.model, path, name)
    Chat(engine, seed=config["seed"]).run()


def load_engine(config: Mapping[str, Any]) -> Any:
    """The configured engine over the loaded base, with the saved adapter if one is named."""
    from hydra.utils import instantiate

    from llm_at_home.adapters.attach import attach_saved
    from llm_at_home.models.loading import has_tokenizer, load_tokenizer
    from llm_at_home.pruning.base import load_base
    from llm_at_home.quantization.base import describe_kernel
    from llm_at_home.quantization.size import size_readings

    options = {key: value for key, value in config["engine"].items() if key != "name"}
    if config["engine"]["name"] == "llamacpp":
        from llm_at_home.generation import llamacpp

        return llamacpp.load(config, options)
    tokenizer = load_tokenizer(config["model"]) if has_tokenizer(config["model"]) else None
    model = load_base(config)
    kernel, size = describe_kernel(model), size_readings(model)  # of the base, whatever adapter is put on it
    if config["adapter_path"]:
        model = attach_saved(model, config["adapter_path"])
    engine = instantiate(options, model=model, tokenizer=tokenizer, _convert_="object")
    engine.kernel, engine.size = kernel, size
    return engine


def _turns(config: Mapping[str, Any], engine: Any, run_id: str) -> QuestionTurns | RandomTurns:
    from llm_at_home.data.questions import questions_of

    options = config["questions"]
    if options["source"] == SYNTHETIC:
        count = config["limit"] or options["count"]
        return RandomTurns(count, options["prompt_tokens"], engine.vocabulary, config["seed"], engine.batch_size)
    questions = questions_of(options, config["limit"])
    words = [config["model"]["name"], config["quant"]["name"], *prune_words(config["prune"])]
    if config["adapter_path"]:
        words.append(Path(config["adapter_path"]).name)
    return QuestionTurns(questions, "-".join(words), config["seed"], engine.batch_size, config["samples"], run_id)


def _warm_up(engine: Any, turns: QuestionTurns | RandomTurns) -> Reading:
    """One batch of the measured size: kernels are chosen and compiled, memory is taken, clocks rise.

    An engine with a graph gets one batch more where some questions are answered greedily and some are not, and half of
    the answers end with each of the last steps: each kind, and each number of them, has a graph of its own, which would
    else be captured in the measured phase.
    """
    from llm_at_home.generation.reply import Sampling

    start = time.perf_counter()
    prompts = turns.first_prompts(engine)
    if has_places(engine):
        # As long as the measured ones, so that the cache and its graphs are those of the measured phase.
        for temperature in turns.kinds(engine):
            lengths = [max(1, engine.warmup_tokens - i.bit_length()) for i in range(len(prompts))]
            sampled = [Sampling(tokens, temperature, ignore_eos=True) for tokens in lengths]
            requests = enumerate(zip(prompts, sampled, strict=True))
            list(engine.stream(requests, longest=turns.longest(engine)))
    else:
        ask(engine, prompts, Sampling(engine.warmup_tokens, ignore_eos=True))
    return Reading(time.perf_counter() - start, "s", "clock", n=1)


def _too_long(replies: Sequence[Any], engine: Any) -> list[str]:
    """A note where a conversation went on beyond the positions that the model was trained on."""
    known = engine.context
    beyond = sum(reply.prompt_tokens + len(reply.tokens) > known for reply in replies) if known else 0
    if not beyond:
        return []
    hint = "their answers are worth little: give a smaller engine.max_new_tokens"
    return [f"{beyond} of {len(replies)} turns went beyond the {known} tokens that the model knows, and {hint}"]


def _smaller_batches(batches: Sequence[Sequence[Any]], size: int) -> list[str]:
    """A note where the questions did not fill every batch, which is then slower for each of its answers."""
    small = [len(batch) for batch in batches if len(batch) < size]
    if not small:
        return []
    return [f"engine.batch_size={size}: {len(small)} of {len(batches)} batches were smaller, down to {min(small)}"]
