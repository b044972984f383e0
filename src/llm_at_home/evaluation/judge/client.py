"""Talks to a judge behind any OpenAI-compatible server: retries, counts, and a key that never gets out."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

from llm_at_home.evaluation.judge.budget import Budget, OverBudget, estimate_tokens
from llm_at_home.evaluation.judge.limits import RateLimit

T = TypeVar("T")

#: A server that wants a longer pause counts as unreachable: nobody watches a bar stand still for hours.
LONGEST_PAUSE_S = 600.0
_LONGEST_BACKOFF_S = 60.0
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
# Errors echo keys with the middle starred out ("sk-abcd****wxyz"): already too much for a log.
_KEY_LIKE = re.compile(r"\bsk-[\w*-]{4,}")


class JudgeError(Exception):
    """The judge gave no reply; the message says why in one line, without the key.

    Where it ends a run, ``counts`` and ``costs`` say what had been asked until then.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.counts: dict[str, int] = {}
        self.costs: dict[str, Any] = {}


class JudgeRejected(JudgeError):
    """This request cannot be served (HTTP 400, 413, 422: too long, filtered); the next one may be."""


class JudgeDenied(JudgeError):
    """No request will be served (HTTP 401, 402, 403, 404, quota used up): the run has to stop."""


class JudgeUnreachable(JudgeError):
    """The server was busy, broken or silent through all retries; a later run may succeed."""


class JudgeOverBudget(JudgeError):
    """The next request might cost more than what is left of ``judge.max_cost_usd``: the run has to stop."""


@dataclass(frozen=True)
class Reply:
    """What the judge said to one request; ``probabilities`` of the ratings 1 to 10, where they were asked for."""

    text: str
    finish_reason: str | None
    served_model: str
    probabilities: tuple[float, ...] | None = None
    cached: bool = False


@dataclass
class Counts:
    """What was asked of the judge in this run; ``calls`` includes ``retries``."""

    calls: int = 0
    retries: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class JudgeClient:
    """Asks a judge, patiently. Safe to use from several threads; a context manager.

    The SDK's own retries are off, so that every request is counted. Busy (429), broken (5xx), silent and
    disconnecting servers, and replies that are no chat completion, are tried again after an exponential
    pause with jitter, or after the server's ``Retry-After`` where that is longer.

    Args:
        model: the exact model name or snapshot that the server knows.
        base_url: the server's address with ``/v1``.
        api_key: the key, or None for a server without one. It is kept out of repr, errors, logs and replies.
        temperature: 0 in the published protocol; None leaves the field out.
        max_tokens: the longest reply in tokens; None leaves the field out.
        timeout_s: seconds of silence after which a try is given up.
        max_retries: tries after the first one.
        extra_body: fields beyond OpenAI's, such as llama.cpp's ``cache_prompt``.
        limit: requests and tokens a minute, for all threads together.
        budget: what may be spent; requests that could exceed it are not sent.
        backoff_s: the first pause in seconds, before jitter.
        sleep: waits for the given seconds; by default a wait that :meth:`stop` ends.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        api_key: str | None = None,
        temperature: float | None = 0.0,
        max_tokens: int | None = 2048,
        timeout_s: float = 120.0,
        max_retries: int = 6,
        extra_body: dict[str, Any] | None = None,
        limit: RateLimit | None = None,
        budget: Budget | None = None,
        backoff_s: float = 1.0,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        import openai

        self.model = model
        self.base_url = base_url
        self.counts = Counts()
        self._key = api_key or ""
        self._max_retries = max_retries
        self._extra_body = extra_body or {}
        self._limit = limit or RateLimit()
        self.budget = budget or Budget()
        self._max_tokens = max_tokens or 0
        self._backoff_s = backoff_s
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait
        self._guard = threading.Lock()
        self._fields: dict[str, Any] = {"model": model}
        if temperature is not None:
            self._fields["temperature"] = temperature
        if max_tokens is not None:
            self._fields["max_tokens"] = max_tokens
        # A proxy from the environment would carry loopback requests, and the key, to another machine.
        loopback = urlsplit(base_url).hostname in _LOOPBACK
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=api_key or "none",
            timeout=timeout_s,
            max_retries=0,
            http_client=openai.DefaultHttpxClient(trust_env=False) if loopback else None,
        )

    def __repr__(self) -> str:
        return f"JudgeClient(model={self.model!r}, base_url={self.base_url!r})"

    def __enter__(self) -> JudgeClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._client.close()

    def stop(self) -> None:
        """End all pauses and allow no further try; a request under way is still answered."""
        self._stopped.set()

    def ask(self, messages: Sequence[dict[str, str]], extra_body: dict[str, Any] | None = None) -> Reply:
        """One reply to one conversation, after as many tries as it takes.

        Raises:
            JudgeRejected: when the server will not serve this request.
            JudgeDenied: when it will not serve any.
            JudgeUnreachable: when all tries failed, or :meth:`stop` was called.
            JudgeOverBudget: when the request could cost more than what is left.
        """
        return self._patiently(lambda: self._chat(messages, extra_body or {}), estimate_tokens(messages))

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """A server's own endpoint beside OpenAI's, such as llama.cpp's ``/completion``; raises as :meth:`ask`."""
        root = self.base_url.rstrip("/").removesuffix("/v1")

        def send() -> tuple[dict[str, Any], int, int]:
            reply: Any = self._client.post(f"{root}{path}", body=dict(body), cast_to=object)
            if not isinstance(reply, dict):
                raise _TryAgain("the reply was no JSON object")
            return reply, int(reply.get("tokens_evaluated") or 0), int(reply.get("tokens_predicted") or 0)

        return self._patiently(send, estimate_tokens([{"content": str(body)}]))

    @property
    def sdk(self) -> Any:
        """The ``openai`` client beneath, for endpoints that need no patience of ours (files, batches)."""
        return self._client

    def request(self, messages: Sequence[dict[str, str]], extra_body: Mapping[str, Any]) -> dict[str, Any]:
        """The body that :meth:`ask` sends."""
        return {**self._fields, "messages": list(messages), **self._extra_body, **extra_body}

    def read(self, completion: Any) -> Reply:
        """The reply in a chat completion of the SDK.

        Raises:
            ValueError: when it is none.
        """
        from openai.types.chat import ChatCompletion

        if not isinstance(completion, ChatCompletion) or not completion.choices or not completion.choices[0].message:
            raise ValueError("the reply was no chat completion")
        choice = completion.choices[0]
        text = self.redact(choice.message.content or "")
        return Reply(text, choice.finish_reason, completion.model or self.model)

    def count(self, **more: int) -> None:
        """Add to :attr:`counts`; safe from several threads."""
        with self._guard:
            for name, value in more.items():
                setattr(self.counts, name, getattr(self.counts, name) + value)

    def _patiently(self, send: Callable[[], tuple[T, int, int]], prompt_tokens: int) -> T:
        tries = 0
        while True:
            if self._stopped.is_set():
                raise JudgeUnreachable("the judge was stopped before it answered")
            try:
                return self._try(send, prompt_tokens, first=tries == 0)
            except _TryAgain as fault:
                tries += 1
                if tries > self._max_retries or fault.pause_s > LONGEST_PAUSE_S:
                    self.count(failures=1)
                    wish = f"; it asks for a pause of {fault.pause_s:.0f} s" if fault.pause_s else ""
                    raise JudgeUnreachable(
                        f"the judge at {self.base_url} gave no reply in {tries} tries: {fault}{wish}"
                    ) from None
                self._sleep(max(fault.pause_s, self._backoff(tries)))
            except JudgeOverBudget:
                raise
            except JudgeError:
                self.count(failures=1)
                raise

    def redact(self, text: str) -> str:
        """The text without the key."""
        # Shorter "keys" are placeholders ("none", "EMPTY"): replacing them would garble ordinary words.
        return text.replace(self._key, "[key]") if len(self._key) >= 8 else text

    def _chat(self, messages: Sequence[dict[str, str]], extra_body: dict[str, Any]) -> tuple[Reply, int, int]:
        reply: Any = self._client.chat.completions.create(
            messages=messages,  # type: ignore[arg-type]
            extra_body={**self._extra_body, **extra_body} or None,
            **self._fields,
        )
        try:
            read = self.read(reply)
        except ValueError as error:
            raise _TryAgain(str(error)) from None
        usage = reply.usage
        return read, (usage.prompt_tokens or 0) if usage else 0, (usage.completion_tokens or 0) if usage else 0

    def _try(self, send: Callable[[], tuple[T, int, int]], prompt_tokens: int, *, first: bool) -> T:
        import openai

        self._limit.wait(prompt_tokens + self._max_tokens, self._sleep)
        if self._stopped.is_set():
            raise JudgeUnreachable("the judge was stopped before it answered")
        try:
            reserved = self.budget.reserve(prompt_tokens, self._max_tokens)
        except OverBudget as error:
            raise JudgeOverBudget(str(error)) from None
        self.count(calls=1, retries=0 if first else 1)
        billed = True  # a request that was cut off may have been answered, and paid for, all the same
        try:
            value, asked, answered = send()
        # All are raised "from None": the SDK's errors hold the request, and with it the key.
        except openai.APITimeoutError:
            raise _TryAgain("timed out") from None
        except openai.APIStatusError as error:
            billed = False
            raise self._fault(error) from None
        except openai.APIConnectionError as error:
            raise _TryAgain(self._clean(f"connection failed ({error.__cause__ or error})")) from None
        except (openai.APIResponseValidationError, ValueError):
            raise _TryAgain("the reply was no JSON") from None
        else:
            billed = False
            self.budget.spend(asked or prompt_tokens, answered)
            self.count(prompt_tokens=asked, completion_tokens=answered)
            return value
        finally:
            self.budget.release(reserved, billed=billed)

    def _fault(self, error: Any) -> Exception:
        status = int(error.status_code)
        what = f"HTTP {status}: {self._clean(_one_line(error))}"
        if status == 429 and "insufficient_quota" in str(error.body or error):
            return JudgeDenied(f"the judge at {self.base_url} has no quota left ({what})")
        if status in (408, 409, 425, 429) or status >= 500:
            return _TryAgain(what, _retry_after(error.response.headers))
        if status in (401, 402, 403, 404):
            return JudgeDenied(f"the judge at {self.base_url} denies access to {self.model} ({what})")
        return JudgeRejected(f"the judge rejects the request ({what})")

    def _clean(self, message: str) -> str:
        # Only in errors: in a judge's prose this pattern could hit ordinary words.
        return _KEY_LIKE.sub("[key]", self.redact(message))[:300]

    def _backoff(self, tries: int) -> float:
        # Jitter keeps threads that failed together from coming back together.
        return min(_LONGEST_BACKOFF_S, self._backoff_s * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)


class _TryAgain(Exception):
    """A fault that may pass, and the pause in seconds that the server asked for."""

    def __init__(self, what: str, pause_s: float = 0.0) -> None:
        super().__init__(what)
        self.pause_s = pause_s


def _one_line(error: Any) -> str:
    body = error.body
    said = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(said or error.message).split())


def _retry_after(headers: Any) -> float:
    """Seconds from ``Retry-After-Ms``, or from ``Retry-After`` as a number or an HTTP date; 0 for none."""
    milliseconds, said = headers.get("retry-after-ms", ""), headers.get("retry-after", "")
    for text, scale in ((milliseconds, 1e-3), (said, 1.0)):
        if re.fullmatch(r"\d+(\.\d+)?", text.strip()):
            return float(text) * scale
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
