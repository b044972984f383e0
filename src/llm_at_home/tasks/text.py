"""The text evaluation: a test split answered, with or without passages in the prompt, and what each answer takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.records.schema import Reading, Record

ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Asked:
    """A test split as it is put to the model.

    ``messages`` are whole conversations with their reference at the end, ``passages`` what each has in its system
    message, ``prompts`` token ids up to the answer; ``seconds`` is what choosing and tokenizing took, all together.
    """

    messages: list[list[dict[str, str]]]
    passages: list[list[str]]
    prompts: list[list[int]]
    seconds: float


def ask(config: Mapping[str, Any], conversations: Sequence[Any]) -> Asked:
    """Put the passages that ``text.context`` says into each conversation.

    Raises:
        Refusal: when passages make a prompt longer than the model's context, before the model loads.
    """
    from llm_at_home.evaluation.context import NONE, Context
    from llm_at_home.metering.timing import now
    from llm_at_home.models.chat import prompt_ids
    from llm_at_home.models.loading import load_config, load_tokenizer

    tokenizer = load_tokenizer(config["model"])
    context = Context(config["text"], config["data"]["source"])
    start = now()
    # The answer is no part of what is searched for.
    passages = [context.passages(c.messages[:-1]) for c in conversations]
    messages = [context.prompted(c.messages, p) for c, p in zip(conversations, passages, strict=True)]
    prompts = [prompt_ids(tokenizer, one[:-1]) for one in messages]
    seconds = now() - start
    if config["text"]["context"] != NONE:
        _check_length(max(map(len, prompts)), config, load_config(config["model"]))
    return Asked(messages, passages, prompts, seconds)


def _check_length(longest: int, config: Mapping[str, Any], model: Any) -> None:
    options, room = config["text"], getattr(model, "max_position_embeddings", None)
    if room is not None and longest + options["max_new_tokens"] > room:
        raise Refusal(
            f"text.context={options['context']} makes a prompt of {longest} tokens, which with text.max_new_tokens="
            f"{options['max_new_tokens']} is more than the model's context of {room}: use text.context=retrieved with "
            "a smaller text.retrieved"
        )


def answer(config: Mapping[str, Any], engine: Any, asked: Asked, record: Record) -> list[str]:
    """Greedy answers in the given order, made in batches of prompts of similar length; costs go into ``record``.

    The measured phase is from the first batch to the last, after a warm-up on one prompt. ``time_per_question`` is its
    seconds over the questions, with what choosing passages and tokenizing took; its interval is over batches.
    """
    from llm_at_home.generation.reply import Sampling
    from llm_at_home.generation.speed import speed_readings
    from llm_at_home.metering.energy import EnergyMeter
    from llm_at_home.metering.timing import now

    prompts, size, device = asked.prompts, config["text"]["batch_size"], config["gpu"]["device"]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    sampling = Sampling(config["text"]["max_new_tokens"])
    batches, seconds = [], []
    with EnergyMeter(device) as energy:
        engine.reply_batch([prompts[order[0]]], Sampling(engine.warmup_tokens, ignore_eos=True))
        energy.measure_idle()
        energy.start()
        try:
            for start in range(0, len(order), size):
                edge = now(device)
                batches.append(engine.reply_batch([prompts[i] for i in order[start : start + size]], sampling))
                seconds.append(now(device) - edge)
        finally:
            energy.stop()
        record.readings |= energy.readings("question", len(prompts))
        record.notes += energy.flags
    replies = [reply for batch in batches for reply in batch]
    record.readings |= speed_readings([batches])
    record.readings |= question_readings(replies, seconds, [len(batch) for batch in batches], asked)
    record.counts |= {
        "prompt_tokens": sum(reply.prompt_tokens for reply in replies),
        "generated_tokens": sum(len(reply.tokens) for reply in replies),
        "answers_at_the_length_limit": sum(reply.finish_reason == "length" for reply in replies),
    }
    texts = dict(zip(order, (reply.text for reply in replies), strict=True))
    return [texts[i] for i in range(len(prompts))]


def question_readings(
    replies: Sequence[Any], seconds: Sequence[float], sizes: Sequence[int], asked: Asked
) -> dict[str, Reading]:
    """What a question takes, on average over a test split.

    Args:
        replies: to the questions.
        seconds: of each batch.
        sizes: questions in each batch.
        asked: what they were asked.

    Returns:
        ``prompt_tokens_per_question``, ``generated_tokens_per_question``, ``time_per_question`` (s), and
        ``prompt_tokens_shared``: the tokens with which every prompt begins, which a server can keep.
    """
    import numpy as np

    from llm_at_home.evaluation.statistics import bootstrap_interval95
    from llm_at_home.metering.timing import mean_interval95

    def tokens(numbers: Sequence[int]) -> Reading:
        values = [float(number) for number in numbers]
        return Reading(float(np.mean(values)), "tokens", "counted", mean_interval95(values), len(values))

    time, count, before = np.array(seconds), np.array(sizes), asked.seconds / len(replies)
    ends = bootstrap_interval95(len(time), lambda chosen: float(time[chosen].sum() / count[chosen].sum()) + before)
    method = f"synchronized_clock_batch_{max(sizes)}"
    return {
        "prompt_tokens_per_question": tokens([reply.prompt_tokens for reply in replies]),
        "prompt_tokens_shared": Reading(float(shared_prefix(asked.prompts)), "tokens", "counted", n=len(replies)),
        "generated_tokens_per_question": tokens([len(reply.tokens) for reply in replies]),
        "time_per_question": Reading(float(time.sum() / count.sum()) + before, "s", method, ends, len(replies)),
    }


def shared_prefix(prompts: Sequence[list[int]]) -> int:
    """With how many tokens all prompts begin alike."""
    first, last = min(prompts), max(prompts)  # in order, whatever lies between begins as these two do
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def write(folder: Path, conversations: Sequence[Any], asked: Asked, answers: Sequence[str]) -> None:
    """``answers.jsonl`` in the run folder, a question a line, with its passages where they are its own."""
    own = any(passages != asked.passages[0] for passages in asked.passages)
    with (folder / ANSWERS).open("w", encoding="utf-8") as file:
        for conversation, passages, said in zip(conversations, asked.passages, answers, strict=True):
            row = {"id": conversation.id, "kind": conversation.kind, "answer": said}
            row |= {"question": conversation.messages[-2]["content"], "reference": conversation.messages[-1]["content"]}
            row |= {"passages": passages} if own else {}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
