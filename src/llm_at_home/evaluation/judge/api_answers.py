"""Answers of a model behind an OpenAI-compatible API, in FastChat's format: a bound to set one's own models beside."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llm_at_home.data.questions import load_questions
from llm_at_home.errors import Refusal
from llm_at_home.evaluation.judge.client import JudgeClient
from llm_at_home.evaluation.judge.settings import api_key
from llm_at_home.generation.reply import temperature_for
from llm_at_home.records.jsonl import JsonlLog


def answer(options: Any) -> str:
    """Ask every question that the file lacks, both turns in one conversation, and say in a line what was done.

    Args:
        options: ``base_url``, ``model``, ``out``, ``questions``, ``limit``, ``api_key_env``, ``max_tokens``,
            ``temperature`` and ``samples`` of the command line.

    Raises:
        Refusal: for questions or a key that are not there, numbers and addresses that make no sense, and a file that
            holds another model's answers.
        JudgeError: when the server does not answer; what was answered is kept.
    """
    _check(options)
    known = options.questions in ("mt_bench", "home_bench")
    questions = load_questions(
        options.questions if known else "path", path=None if known else options.questions, limit=options.limit
    )
    key = api_key({"name": "server", "api_key_env": options.api_key_env, "base_url": options.base_url})
    asked = 0
    with JsonlLog(Path(options.out), key=lambda row: row["question_id"]) as log:
        done = log.keys()
        others = {str(row.get("model_id")) for row in log.rows()} - {options.model}
        if others:
            raise Refusal(f"{options.out} holds answers of {', '.join(sorted(others))}: give another file with --out")
        for question in questions:
            if question.question_id in done:
                continue
            temperature = temperature_for(question.category, options.temperature)
            samples = options.samples if temperature > 0 else 1
            with JudgeClient(
                options.model, options.base_url, api_key=key, temperature=temperature, max_tokens=options.max_tokens
            ) as client:
                choices = [{"index": i, "turns": _converse(client, question)} for i in range(samples)]
            asked += 1
            log.append(
                {
                    "question_id": question.question_id,
                    "answer_id": hashlib.sha256(f"{options.model}{question.question_id}".encode()).hexdigest()[:22],
                    "model_id": options.model,
                    "choices": choices,
                    "tstamp": time.time(),
                    "category": question.category,
                }
            )
    return f"{options.out}: {asked} questions answered by {options.model}, {len(questions) - asked} were there"


def _check(options: Any) -> None:
    for name in ("samples", "max_tokens"):
        if getattr(options, name) < 1:
            raise Refusal(f"--{name.replace('_', '-')} {getattr(options, name)} is too small: give at least 1")
    address = urlsplit(options.base_url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise Refusal(f"--base-url {options.base_url} is no address: give http://HOST:PORT/v1")


def _converse(client: JudgeClient, question: Any) -> list[str]:
    messages: list[dict[str, str]] = []
    turns = []
    for turn in question.turns:
        messages.append({"role": "user", "content": turn})
        turns.append(client.ask(messages).text)
        messages.append({"role": "assistant", "content": turns[-1]})
    return turns
