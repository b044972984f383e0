"""The eager engine: transformers' own ``generate()``, the reference that other engines are held against."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llm_at_home.generation.reply import COLDEST, Reply, Sampling
from llm_at_home.models.chat import end_of_turn
from llm_at_home.quantization.base import describe_kernel


class EagerEngine:
    """Answers with ``model.generate``.

    Args:
        model: a causal language model of transformers, on its device.
        tokenizer: its tokenizer, or None for a model that is fed token ids only.
        max_new_tokens: the longest answer, in tokens.
        temperature: for every question, or None for the published one of its category.
        batch_size: conversations answered at once in a measured run.
        warmup_tokens: decoded before anything is measured.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_new_tokens: int,
        temperature: float | None = None,
        batch_size: int = 1,
        warmup_tokens: int = 16,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.batch_size = batch_size
        self.warmup_tokens = warmup_tokens
        self._end_of_turn = end_of_turn(tokenizer)

    def describe(self) -> dict[str, Any]:
        """Which linear layers run, by class and backend, for the record."""
        return describe_kernel(self.model)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that can be switched to; the first one's is ``default``."""
        return list(getattr(self.model, "peft_config", {}))

    def use_adapter(self, name: str | None) -> None:
        """Answer with this adapter from now on; None is the base alone.

        Raises:
            ValueError: for None where the adapter is a prompt, which PEFT switches off for a while only.
        """
        if name is not None:
            if not self.model.active_peft_config.is_prompt_learning:
                self.model.enable_adapter_layers()
            self.model.set_adapter(name)
        elif self.model.active_peft_config.is_prompt_learning:
            raise ValueError("a prompt is not switched off: leave out adapter_path")
        else:
            self.model.disable_adapter_layers()

    @property
    def end_ids(self) -> set[int]:
        """Tokens that end an answer: the model's own, and the chat template's at the end of a turn."""
        eos = self.model.generation_config.eos_token_id
        own = set(eos) if isinstance(eos, list) else {eos} if eos is not None else set()
        return own if self._end_of_turn is None else own | {self._end_of_turn}

    @property
    def context(self) -> int | None:
        """Tokens of the longest conversation that the model knows, or None where it does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return self.model.config.vocab_size

    def reply(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        on_text: Callable[[str], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Reply:
        """Answer one prompt, streaming.

        Args:
            prompt: token ids.
            sampling: how to choose tokens.
            on_text: called with each new piece of text.
            should_stop: asked after each token; true ends the answer with finish reason ``stopped``.
        """
        clock = TokenClock(self.tokenizer if on_text else None, on_text)
        stopping = [_StopWhen(should_stop)] if should_stop else []
        (reply,) = self._answer([prompt], sampling, clock, stopping_criteria=stopping)
        if should_stop and should_stop():
            reply.finish_reason = "stopped"
        return reply

    def reply_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Reply]:
        """Answer several prompts at once, padded on the left; each answer is cut at its first end-of-sequence token.

        The seed is the batch's: a sampled answer depends on what it shares its batch with. A greedy one does not, but
        for rounding: matrices of another size are summed in another order, which in 16 bits can turn a near tie.
        """
        return self._answer(prompts, sampling, TokenClock(None, None))

    def _answer(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, clock: TokenClock, **options: Any
    ) -> list[Reply]:
        length = max(len(prompt) for prompt in prompts)
        pad = self._pad_id()
        ids = torch.tensor([[pad] * (length - len(p)) + list(p) for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        start = time.perf_counter()
        output = self._generate(ids, mask, sampling, streamer=clock, **options)[:, length:].tolist()
        clock.end()
        first = clock.times[0] - start if clock.times else None
        steps = [b - a for a, b in itertools.pairwise(clock.times)]
        ends = self.end_ids
        replies = []
        for prompt, row in zip(prompts, output, strict=True):
            tokens = row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]
            intervals = steps[: max(0, len(tokens) - 1)]
            replies.append(
                Reply(self._decode(tokens), tokens, len(prompt), self._finish_reason(tokens), first, intervals)
            )
        return replies

    def _generate(self, ids: torch.Tensor, mask: torch.Tensor, sampling: Sampling, **options: Any) -> torch.Tensor:
        chosen: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampling.temperature > 0:
            warm = max(sampling.temperature, COLDEST)
            chosen = {"do_sample": True, "temperature": warm, "top_p": 1.0, "top_k": 0, "min_p": None}
        torch.manual_seed(sampling.seed)
        with torch.inference_mode():
            return self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=sampling.max_new_tokens,
                min_new_tokens=sampling.max_new_tokens if sampling.ignore_eos else None,
                pad_token_id=self._pad_id(),
                eos_token_id=sorted(self.end_ids) or None,
                repetition_penalty=1.0,
                **chosen,
                **options,
            )

    def _pad_id(self) -> int:
        if self.tokenizer is not None and self.tokenizer.pad_token_id is not None:
            return self.tokenizer.pad_token_id
        return next(iter(self.end_ids), 0)

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip() if self.tokenizer else ""

    def _finish_reason(self, tokens: list[int]) -> str:
        return "stop" if tokens and tokens[-1] in self.end_ids else "length"


class TokenClock:
    """Stands where transformers expects a streamer: notes when tokens reach the host, and passes text on."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        self.times: list[float] = []
        self._prompt_seen = False
        self._text: Any = None
        if tokenizer is not None and on_text is not None:
            from transformers import TextStreamer

            pass_on = on_text

            class _Text(TextStreamer):
                def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                    pass_on(text)

            self._text = _Text(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def put(self, value: torch.Tensor) -> None:
        """Called by ``generate`` with the prompts first and then with each step's tokens, already on the host."""
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True
        if self._text is not None:
            self._text.put(value)

    def end(self) -> None:
        """Let go of text that was held back until a word was whole; ``generate`` calls this too."""
        if self._text is not None:
            self._text.end()
            self._text = None


class _StopWhen:
    """A stopping criterion that asks a function."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._should_stop(), dtype=torch.bool, device=input_ids.device)
