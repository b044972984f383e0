"""What a measured inference run asks, in batches: questions turn by turn, or prompts of random ids."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ANSWERS = "answers.jsonl"


class QuestionTurns:
    """Questions asked turn by turn, each answer becoming part of the next turn's prompt.

    In batches, the first turns of ``batch_size`` questions are answered at once and then their second turns. A batch
    has one temperature, so questions are grouped by it, and one seed, which is that of its first question.
    """

    def __init__(self, questions: Sequence[Any], model_id: str, seed: int, batch_size: int = 1) -> None:
        self.questions = questions
        self.model_id = model_id
        self.seed = seed
        self.batch_size = batch_size

    def first_prompts(self, engine: Any) -> list[list[int]]:
        """The prompts of the first batch, for the warm-up."""
        _, questions = self._batches(engine)[0]
        return [self._prompt(engine, [{"role": "user", "content": question.turns[0]}]) for question in questions]

    def answer(self, engine: Any, folder: Path, repeat: int) -> list[list[Any]]:
        """Answer them all and return the replies batch by batch.

        The first pass is written to ``answers.jsonl`` as it goes, in the questions' order.
        """
        from llm_at_home.records.jsonl import JsonlLog

        made = []
        if repeat == 0:
            (folder / ANSWERS).unlink(missing_ok=True)
        with JsonlLog(folder / ANSWERS, key=lambda row: row["question_id"]) as log:
            unwritten = [question.question_id for question in self.questions]
            rows: dict[int, dict[str, Any]] = {}
            for temperature, questions in self._batches(engine):
                batches, own = self._converse(engine, questions, temperature, repeat)
                made += batches
                if repeat > 0:
                    continue
                rows |= {q.question_id: self._row(q, replies) for q, replies in zip(questions, own, strict=True)}
                while unwritten and unwritten[0] in rows:
                    log.append(rows.pop(unwritten.pop(0)))
        return made

    def _batches(self, engine: Any) -> list[tuple[float, list[Any]]]:
        """Temperature and questions of each batch; one by one, the questions keep their order."""
        from llm_at_home.generation.reply import temperature_for

        asked = [(temperature_for(question.category, engine.temperature), question) for question in self.questions]
        if self.batch_size == 1:
            return [(temperature, [question]) for temperature, question in asked]
        groups: dict[float, list[Any]] = {}
        for temperature, question in asked:
            groups.setdefault(temperature, []).append(question)
        return [(temperature, part) for temperature, group in groups.items() for part in _parts(group, self.batch_size)]

    def _converse(
        self, engine: Any, questions: Sequence[Any], temperature: float, repeat: int
    ) -> tuple[list[list[Any]], list[list[Any]]]:
        """All turns of one batch of questions: the replies by turn, and by question."""
        from llm_at_home.generation.reply import Sampling

        messages: list[list[dict[str, str]]] = [[] for _ in questions]
        own: list[list[Any]] = [[] for _ in questions]
        batches = []
        for turn in range(max(len(question.turns) for question in questions)):
            asked = [i for i, question in enumerate(questions) if turn < len(question.turns)]
            for i in asked:
                messages[i].append({"role": "user", "content": questions[i].turns[turn]})
            seed = _turn_seed(self.seed, repeat, questions[asked[0]].question_id, turn)
            prompts = [self._prompt(engine, messages[i]) for i in asked]
            replies = ask(engine, prompts, Sampling(engine.max_new_tokens, temperature, seed))
            for i, reply in zip(asked, replies, strict=True):
                messages[i].append({"role": "assistant", "content": reply.text})
                own[i].append(reply)
            batches.append(replies)
        return batches, own

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

    def __init__(self, count: int, prompt_tokens: int, vocabulary: int, seed: int, batch_size: int = 1) -> None:
        import torch

        self.seed = seed
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(seed)
        self.prompts: list[list[int]] = torch.randint(
            0, vocabulary, (count, prompt_tokens), generator=generator
        ).tolist()

    def first_prompts(self, engine: Any) -> list[list[int]]:
        """The prompts of the first batch, for the warm-up."""
        return self.prompts[: self.batch_size]

    def answer(self, engine: Any, folder: Path, repeat: int) -> list[list[Any]]:
        """Answer them all, greedily, and return the replies batch by batch; there is no text to write down."""
        from llm_at_home.generation.reply import Sampling

        sampling = Sampling(engine.max_new_tokens, 0.0, self.seed, ignore_eos=True)
        return [ask(engine, prompts, sampling) for prompts in _parts(self.prompts, self.batch_size)]


def _parts(items: Sequence[Any], size: int) -> list[list[Any]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def ask(engine: Any, prompts: Sequence[Sequence[int]], sampling: Any) -> list[Any]:
    """Replies to one prompt, or to several at once."""
    return [engine.reply(prompts[0], sampling)] if len(prompts) == 1 else engine.reply_batch(prompts, sampling)


def _turn_seed(seed: int, repeat: int, question_id: int, turn: int) -> int:
    """A seed for each answer, the same whatever was asked before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{repeat}/{question_id}/{turn}".encode()).digest()[:4], "big")
