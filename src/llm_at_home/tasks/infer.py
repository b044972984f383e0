"""Inference, from a model and questions to answers and what each token cost; or a chat in the terminal."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_at_home.records.schema import Reading, Record
from llm_at_home.records.tracking import Tracker
from llm_at_home.tasks.resolve import SYNTHETIC

ANSWERS = "answers.jsonl"
WARMUP_TOKENS = 4


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
    from llm_at_home.metering.energy import EnergyMeter
    from llm_at_home.quantization.base import describe_kernel

    start = time.perf_counter()
    engine = load_engine(config)
    record.readings["load_time"] = Reading(time.perf_counter() - start, "s", "clock")
    record.kernel = engine.kernel
    record.readings |= engine.size
    turns = _turns(config, engine)
    record.readings["warmup_time"] = _warm_up(engine, turns)
    record.kernel = describe_kernel(engine.model)  # a layer may choose its kernel at its first call

    with EnergyMeter(config["gpu"]["device"]) as energy:
        energy.measure_idle()
        memory.begin_measured()
        energy.start()
        try:
            passes = [turns.answer(engine, folder, repeat) for repeat in range(config["repeats"])]
        finally:
            energy.stop()
        replies = [reply for one in passes for reply in one]
        record.readings |= energy.readings("token", sum(len(reply.tokens) for reply in replies))
        record.notes += energy.flags
    record.readings |= _speed(passes)
    record.counts |= {
        "turns": len(replies),
        "prompt_tokens": sum(reply.prompt_tokens for reply in replies),
        "generated_tokens": sum(len(reply.tokens) for reply in replies),
        "answers_at_the_length_limit": sum(reply.finish_reason == "length" for reply in replies),
    }


def chat(config: dict[str, Any]) -> None:
    """Talk to the model in this process, whose terminal it needs."""
    from llm_at_home.generation.chat import Chat

    Chat(load_engine(config), seed=config["seed"]).run()


def load_engine(config: Mapping[str, Any]) -> Any:
    """The configured engine over the loaded base, with the saved adapter if one is named."""
    from hydra.utils import instantiate

    from llm_at_home.adapters.attach import attach_saved
    from llm_at_home.models.loading import has_tokenizer, load_tokenizer
    from llm_at_home.quantization.base import describe_kernel, load_base
    from llm_at_home.quantization.size import size_readings

    tokenizer = load_tokenizer(config["model"]) if has_tokenizer(config["model"]) else None
    model = load_base(config)
    kernel, size = describe_kernel(model), size_readings(model)  # of the base, whatever adapter is put on it
    if config["adapter_path"]:
        model = attach_saved(model, config["adapter_path"])
    options = {key: value for key, value in config["engine"].items() if key != "name"}
    engine = instantiate(options, model=model, tokenizer=tokenizer, _convert_="object")
    engine.kernel, engine.size = kernel, size
    return engine


class QuestionTurns:
    """Questions asked turn by turn, each answer becoming part of the next turn's prompt."""

    def __init__(self, questions: Sequence[Any], model_id: str, seed: int) -> None:
        self.questions = questions
        self.model_id = model_id
        self.seed = seed

    def first_prompt(self, engine: Any) -> list[int]:
        """The prompt of the first turn, for the warm-up."""
        return self._prompt(engine, [{"role": "user", "content": self.questions[0].turns[0]}])

    def answer(self, engine: Any, folder: Path, repeat: int) -> list[Any]:
        """Answer them all; the first pass is written to ``answers.jsonl`` as it goes."""
        from llm_at_home.generation.reply import Sampling, temperature_for
        from llm_at_home.records.jsonl import JsonlLog

        replies = []
        if repeat == 0:
            (folder / ANSWERS).unlink(missing_ok=True)
        with JsonlLog(folder / ANSWERS, key=lambda row: row["question_id"]) as log:
            for question in self.questions:
                messages: list[dict[str, str]] = []
                own = []
                for turn, text in enumerate(question.turns):
                    messages.append({"role": "user", "content": text})
                    temperature = temperature_for(question.category, engine.temperature)
                    seed = _turn_seed(self.seed, repeat, question.question_id, turn)
                    reply = engine.reply(
                        self._prompt(engine, messages), Sampling(engine.max_new_tokens, temperature, seed)
                    )
                    messages.append({"role": "assistant", "content": reply.text})
                    own.append(reply)
                replies += own
                if repeat == 0:
                    log.append(self._row(question, own))
        return replies

    @staticmethod
    def _prompt(engine: Any, messages: list[dict[str, str]]) -> list[int]:
        from llm_at_home.models.chat import prompt_ids

        return prompt_ids(engine.tokenizer, messages)

    def _row(self, question: Any, replies: Sequence[Any]) -> dict[str, Any]:
        return {
            "question_id": question.question_id,
            "answer_id": hashlib.sha256(f"{self.model_id}{question.question_id}".encode()).hexdigest()[:22],
            "model_id": self.model_id,
            "choices": [{"index": 0, "turns": [reply.text for reply in replies]}],
            "tstamp": time.time(),
            "category": question.category,
            "prompt_tokens": [reply.prompt_tokens for reply in replies],
            "generated_tokens": [len(reply.tokens) for reply in replies],
            "finish_reasons": [reply.finish_reason for reply in replies],
        }


class RandomTurns:
    """Prompts of random token ids for a model without a tokenizer; every answer has the full length."""

    def __init__(self, count: int, prompt_tokens: int, vocabulary: int, seed: int) -> None:
        from llm_at_home.training.data import random_conversations

        self.seed = seed
        self.prompts = [c.input_ids for c in random_conversations(count, prompt_tokens, vocabulary, seed)]

    def first_prompt(self, engine: Any) -> list[int]:
        """The first prompt, for the warm-up."""
        return self.prompts[0]

    def answer(self, engine: Any, folder: Path, repeat: int) -> list[Any]:
        """Answer them all, greedily; there is no text to write down."""
        from llm_at_home.generation.reply import Sampling

        return [engine.reply(p, Sampling(engine.max_new_tokens, 0.0, self.seed, ignore_eos=True)) for p in self.prompts]


def _turns(config: Mapping[str, Any], engine: Any) -> QuestionTurns | RandomTurns:
    from llm_at_home.data.questions import load_questions

    options = config["questions"]
    if options["source"] == SYNTHETIC:
        count = config["limit"] or options["count"]
        return RandomTurns(count, options["prompt_tokens"], engine.model.config.vocab_size, config["seed"])
    questions = load_questions(
        options["source"],
        path=options["path"],
        ids=options["ids"],
        limit=config["limit"],
        references=options["references"] or "gpt-4",
    )
    words = [config["model"]["name"], config["quant"]["name"]]
    if config["adapter_path"]:
        words.append(Path(config["adapter_path"]).name)
    return QuestionTurns(questions, "-".join(words), config["seed"])


def _turn_seed(seed: int, repeat: int, question_id: int, turn: int) -> int:
    """A seed for each answer, the same whatever was asked before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{repeat}/{question_id}/{turn}".encode()).digest()[:4], "big")


def _warm_up(engine: Any, turns: QuestionTurns | RandomTurns) -> Reading:
    from llm_at_home.generation.reply import Sampling

    start = time.perf_counter()
    engine.reply(turns.first_prompt(engine), Sampling(WARMUP_TOKENS, ignore_eos=True))
    return Reading(time.perf_counter() - start, "s", "clock", n=1)


def _speed(passes: Sequence[Sequence[Any]]) -> dict[str, Reading]:
    """Speed figures: each the mean over passes, with an interval where there are several.

    The clock stands where a token reaches the host, which has waited for the device by then.
    """
    from llm_at_home.metering.timing import mean_interval95, percentile

    def figure(values: list[float], unit: str) -> Reading:
        interval = mean_interval95(values)
        return Reading(statistics.fmean(values), unit, "token_on_host_clock", interval95=interval, n=len(values))

    firsts = [[r.time_to_first_token for r in one if r.time_to_first_token is not None] for one in passes]
    intervals = [[seconds for r in one for seconds in r.intervals] for one in passes]
    if not all(firsts) or not all(intervals):
        reason = "no answer had two tokens"
        return {"decode_tokens_per_second": Reading.unknown("tokens/s", reason)}
    prompts = [sum(r.prompt_tokens for r in one) for one in passes]
    figures = {
        "time_to_first_token": figure([statistics.fmean(one) for one in firsts], "s"),
        "prefill_tokens_per_second": figure(
            [tokens / sum(one) for tokens, one in zip(prompts, firsts, strict=True)], "tokens/s"
        ),
        "decode_tokens_per_second": figure([len(one) / sum(one) for one in intervals], "tokens/s"),
    }
    for name, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99)):
        figures[f"inter_token_latency_{name}"] = figure([percentile(one, share) for one in intervals], "s")
    return figures
