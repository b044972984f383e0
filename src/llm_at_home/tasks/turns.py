"""What a measured inference run asks, in batches: questions turn by turn, or prompts of random ids."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ANSWERS = "answers.jsonl"
SPARE = 16  # tokens a turn that a template may add around an answer


class QuestionTurns:
    """Questions asked turn by turn, each answer becoming part of the next turn's prompt.

    In batches, the first turns of ``batch_size`` conversations are answered at once and then their second turns. A
    batch has one temperature, so questions are grouped by it, and one seed, which is that of its first conversation.

    An engine that fills places (``stream``) gets all conversations at once instead: each has its own temperature and
    seed, its second turn follows its first as soon as there is a place, and the answers are those of one by one.

    Args:
        questions: with one or two turns each.
        model_id: the model's name in the answers.
        seed: of the sampling.
        batch_size: conversations answered at once.
        samples: answers to each question, as FastChat's ``choices``. A question that is answered greedily has one
            answer all the same: the others would be its copies.
        run_id: goes into each row as ``config_hash``; rows of the same run that are there already are kept.
    """

    def __init__(
        self,
        questions: Sequence[Any],
        model_id: str,
        seed: int,
        batch_size: int = 1,
        samples: int = 1,
        run_id: str | None = None,
    ) -> None:
        self.questions = questions
        self.model_id = model_id
        self.seed = seed
        self.batch_size = batch_size
        self.samples = samples
        self.run_id = run_id
        self.kept = 0

    def first_prompts(self, engine: Any) -> list[list[int]]:
        """The prompts of the first batch, or for all places, for the warm-up."""
        batches = self._batches(engine)
        asked = (
            [one for _, part in batches for one in part][: self.batch_size] if self.streams(engine) else batches[0][1]
        )
        return [self._prompt(engine, [{"role": "user", "content": one.question.turns[0]}]) for one in asked]

    def kinds(self, engine: Any) -> list[float]:
        """A temperature of each kind that there is: 0, and one above."""
        temperatures = {temperature for temperature, _ in self._batches(engine)}
        return [*temperatures & {0.0}, *sorted(temperatures - {0.0})[:1]]

    def answer(self, engine: Any, folder: Path, repeat: int, resume: bool = False) -> list[list[Any]]:
        """Answer them all and return the replies batch by batch.

        The first pass is written to ``answers.jsonl`` as it goes, in the questions' order. With ``resume`` the answers
        that an interrupted run of the same configuration left there are kept, and their batches not asked again; the
        last batch always is, so that there is something to measure. ``kept`` then counts the questions kept.
        """
        from llm_at_home.records.jsonl import JsonlLog

        made = []
        path = folder / ANSWERS
        if repeat == 0 and not (resume and self._is_ours(path)):
            path.unlink(missing_ok=True)
        batches = self._batches(engine)
        with JsonlLog(path, key=lambda row: row["question_id"]) as log:
            done = log.keys() if repeat == 0 else frozenset()
            todo = [batch for batch in batches if not all(one.question.question_id in done for one in batch[1])]
            todo = todo or batches[-1:]
            again = {one.question.question_id for _, asked in todo for one in asked}
            self.kept = len(done - again) if repeat == 0 else self.kept
            unwritten = [q for q in self.questions if q.question_id not in done]
            replies: dict[int, dict[int, list[Any]]] = {}

            def keep(one: _Asked, turns: list[Any]) -> None:
                if repeat > 0:
                    return
                replies.setdefault(one.question.question_id, {})[one.sample] = turns
                while unwritten and self._is_whole(engine, unwritten[0], replies):
                    question = unwritten.pop(0)
                    samples = replies.pop(question.question_id)
                    log.append(self._row(question, [samples[i] for i in sorted(samples)]))

            if self.streams(engine):
                return [self._stream(engine, [one for _, asked in todo for one in asked], repeat, keep)]
            for temperature, asked in todo:
                answered, own = self._converse(engine, asked, temperature, repeat)
                made += answered
                for one, turns in zip(asked, own, strict=True):
                    keep(one, turns)
        return made

    def streams(self, engine: Any) -> bool:
        """Whether the engine's places are filled as they become free."""
        return self.batch_size > 1 and has_places(engine)

    def longest(self, engine: Any) -> int:
        """Tokens of the longest conversation with the longest answers."""
        sizes = []
        for question in self.questions:
            messages = []
            for turn in question.turns:
                messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": ""}]
            sizes.append(len(self._prompt(engine, messages)) + len(question.turns) * (engine.max_new_tokens + SPARE))
        return max(sizes)

    def _stream(
        self, engine: Any, asked: Sequence[_Asked], repeat: int, keep: Callable[[_Asked, list[Any]], None]
    ) -> Any:
        """All turns of all conversations, in the engine's places; ``keep`` gets each conversation that is whole."""
        from llm_at_home.generation.reply import Sampling, Stream, temperature_for

        messages: list[list[dict[str, str]]] = [[] for _ in asked]
        own: list[list[Any]] = [[] for _ in asked]

        def request(i: int, turn: int) -> Any:
            one = asked[i]
            messages[i].append({"role": "user", "content": one.question.turns[turn]})
            temperature = temperature_for(one.question.category, engine.temperature)
            sampling = Sampling(engine.max_new_tokens, temperature, _turn_seed(self.seed, repeat, one, turn))
            return (i, turn), (self._prompt(engine, messages[i]), sampling)

        def then(key: tuple[int, int], reply: Any) -> Any:
            i, turn = key
            messages[i].append({"role": "assistant", "content": reply.text})
            own[i].append(reply)
            if turn + 1 < len(asked[i].question.turns):
                return request(i, turn + 1)
            keep(asked[i], own[i])
            return None

        requests = [request(i, 0) for i in range(len(asked))]
        made = engine.stream(requests, longest=self.longest(engine), then=then)
        return Stream((reply for _, reply in made), min(self.batch_size, len(asked)))

    def _is_ours(self, path: Path) -> bool:
        from llm_at_home.records.jsonl import read_jsonl

        if not path.is_file() or self.run_id is None:
            return False
        return all(row.get("config_hash") == self.run_id for row in read_jsonl(path))

    def _times(self, engine: Any, question: Any) -> int:
        from llm_at_home.generation.reply import temperature_for

        return self.samples if temperature_for(question.category, engine.temperature) > 0 else 1

    def _is_whole(self, engine: Any, question: Any, replies: dict[int, dict[int, list[Any]]]) -> bool:
        return len(replies.get(question.question_id, ())) == self._times(engine, question)

    def _batches(self, engine: Any) -> list[tuple[float, list[_Asked]]]:
        """Temperature and conversations of each batch; one by one, the questions keep their order."""
        from llm_at_home.generation.reply import temperature_for

        asked = [
            (temperature_for(question.category, engine.temperature), _Asked(question, sample))
            for question in self.questions
            for sample in range(self._times(engine, question))
        ]
        if self.batch_size == 1:
            return [(temperature, [one]) for temperature, one in asked]
        groups: dict[float, list[_Asked]] = {}
        for temperature, one in asked:
            groups.setdefault(temperature, []).append(one)
        return [(temperature, part) for temperature, group in groups.items() for part in _parts(group, self.batch_size)]

    def _converse(
        self, engine: Any, asked: Sequence[_Asked], temperature: float, repeat: int
    ) -> tuple[list[list[Any]], list[list[Any]]]:
        """All turns of one batch of conversations: the replies by turn, and by conversation."""
        from llm_at_home.generation.reply import Sampling

        messages: list[list[dict[str, str]]] = [[] for _ in asked]
        own: list[list[Any]] = [[] for _ in asked]
        batches = []
        for turn in range(max(len(one.question.turns) for one in asked)):
            going = [i for i, one in enumerate(asked) if turn < len(one.question.turns)]
            for i in going:
                messages[i].append({"role": "user", "content": asked[i].question.turns[turn]})
            seed = _turn_seed(self.seed, repeat, asked[going[0]], turn)
            prompts = [self._prompt(engine, messages[i]) for i in going]
            replies = ask(engine, prompts, Sampling(engine.max_new_tokens, temperature, seed))
            for i, reply in zip(going, replies, strict=True):
                messages[i].append({"role": "assistant", "content": reply.text})
                own[i].append(reply)
            batches.append(replies)
        return batches, own

    @staticmethod
    def _prompt(engine: Any, messages: list[dict[str, str]]) -> list[int]:
        from llm_at_home.models.chat import prompt_ids

        return prompt_ids(engine.tokenizer, messages)

    def _row(self, question: Any, samples: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """FastChat's fields, then ours: of each turn, choice after choice."""
        replies = [reply for turns in samples for reply in turns]
        return {
            "question_id": question.question_id,
            "answer_id": hashlib.sha256(f"{self.model_id}{question.question_id}".encode()).hexdigest()[:22],
            "model_id": self.model_id,
            "choices": [{"index": i, "turns": [reply.text for reply in turns]} for i, turns in enumerate(samples)],
            "tstamp": time.time(),
            "category": question.category,
            "prompt_tokens": [reply.prompt_tokens for reply in replies],
            "generated_tokens": [len(reply.tokens) for reply in replies],
            "finish_reasons": [reply.finish_reason for reply in replies],
            "config_hash": self.run_id,
        }


@dataclass(frozen=True)
class _Asked:
    """One conversation: a question, and which of its samples."""

    question: Any
    sample: int


class RandomTurns:
    """Prompts of random token ids for a model without a tokenizer; every answer has the full length."""

    def kinds(self, engine: Any) -> list[float]:
        """All are answered greedily."""
        return [0.0]

    def longest(self, engine: Any) -> int:
        """Tokens of a prompt with its answer."""
        return len(self.prompts[0]) + int(engine.max_new_tokens)

    def __init__(self, count: int, prompt_tokens: int, vocabulary: int, seed: int, batch_size: int = 1) -> None:
        import torch

        self.seed = seed
        self.batch_size = batch_size
        self.kept = 0
        generator = torch.Generator().manual_seed(seed)
        self.prompts: list[list[int]] = torch.randint(
            0, vocabulary, (count, prompt_tokens), generator=generator
        ).tolist()

    def first_prompts(self, engine: Any) -> list[list[int]]:
        """The prompts of the first batch, for the warm-up."""
        return self.prompts[: self.batch_size]

    def answer(self, engine: Any, folder: Path, repeat: int, resume: bool = False) -> list[list[Any]]:
        """Answer them all, greedily, and return the replies batch by batch; there is no text to write down."""
        from llm_at_home.generation.reply import Sampling

        sampling = Sampling(engine.max_new_tokens, 0.0, self.seed, ignore_eos=True)
        return [ask(engine, prompts, sampling) for prompts in _parts(self.prompts, self.batch_size)]


def has_places(engine: Any) -> bool:
    """Whether an engine decodes in places, as one with a graph does where it need not answer eagerly."""
    return hasattr(engine, "stream") and not engine.eager_because


def _parts(items: Sequence[Any], size: int) -> list[list[Any]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def ask(engine: Any, prompts: Sequence[Sequence[int]], sampling: Any) -> list[Any]:
    """Replies to one prompt, or to several at once."""
    return [engine.reply(prompts[0], sampling)] if len(prompts) == 1 else engine.reply_batch(prompts, sampling)


def _turn_seed(seed: int, repeat: int, asked: _Asked, turn: int) -> int:
    """A seed for each answer, the same whatever was asked before it."""
    words = [seed, repeat, asked.question.question_id, turn] + ([asked.sample] if asked.sample else [])
    return int.from_bytes(hashlib.sha256("/".join(map(str, words)).encode()).digest()[:4], "big")
