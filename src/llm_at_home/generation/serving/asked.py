"""What a request asks for, in our own terms; what cannot be done is an :class:`ApiError`, and not left out."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from llm_at_home.generation.reply import Sampling
from llm_at_home.models.chat import prompt_ids

ROLES = ("system", "developer", "user", "assistant")
DONE = (
    *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "seed", "stop", "stream"),
    "stream_options",
)
# About the asker and the account, not about the answer.
WITHOUT_EFFECT = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "parallel_tool_calls",
)
# Everything else would change the answer and is not done: it is an error and not silently left out. But some clients
# always send these, with the value that asks for nothing.
ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


class ApiError(Exception):
    """What the asker is told.

    Args:
        status: of HTTP.
        message: in one sentence.
        headers: further ones.
        code: by which clients know the error, where OpenAI has one.
    """

    def __init__(
        self, status: int, message: str, headers: Mapping[str, str] | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.headers, self.code = status, message, headers, code


def check_keys(body: Mapping[str, Any]) -> None:
    """See that everything that is asked for is done, or does not concern the answer."""
    for key, value in body.items():
        if key not in (*DONE, *WITHOUT_EFFECT) and value is not None and value not in ASKS_FOR_NOTHING.get(key, ()):
            raise ApiError(400, f"{key} is not offered: leave it out")


def flag(body: Mapping[str, Any], key: str) -> bool:
    """A key that is true or false, or not there."""
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{key} is true or false")
    return bool(value)


def wants_usage(body: Mapping[str, Any]) -> bool:
    """Whether a stream is to end with the usage."""
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise ApiError(400, 'stream_options is an object, such as {"include_usage": true}')
    return flag(options or {}, "include_usage")


def prompt_of(tokenizer: Any, body: Mapping[str, Any]) -> list[int]:
    """Token ids of the conversation."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages is missing: give a list of role and content")
    told = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(map(_is_text, content)):
            content = "".join(part["text"] for part in content)
        if role not in ROLES or not isinstance(content, str):
            raise ApiError(400, f"a message has a role of {', '.join(ROLES)} and text as its content")
        told.append({"role": "system" if role == "developer" else role, "content": content})
    try:
        return list(prompt_ids(tokenizer, told))
    except Exception as error:  # templates refuse orders of roles in their own words
        raise ApiError(400, f"the model's chat template takes no such conversation: {error}") from error


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def sampling_of(body: Mapping[str, Any], prompt: int, context: int, most: int, temperature: float) -> Sampling:
    """How the answer's tokens are chosen.

    Args:
        body: of the request.
        prompt: its tokens.
        context: tokens that prompt and answer together may have.
        most: tokens that an answer may have.
        temperature: where the request names none.
    """
    if prompt >= context:
        said = f"the conversation has {prompt} tokens, and prompt and answer together may have {context}"
        raise ApiError(400, said, code="context_length_exceeded")
    longest = _whole_number(body, "max_tokens", most, 1)
    asked = _whole_number(body, "max_completion_tokens", longest, 1)
    seed = _whole_number(body, "seed", secrets.randbits(31), 0)
    warm = temperature if body.get("temperature") is None else body["temperature"]
    if isinstance(warm, bool) or not isinstance(warm, int | float) or not 0 <= warm <= 2:
        raise ApiError(400, f"temperature={warm} is no number from 0 to 2")
    return Sampling(min(asked, context - prompt, most), float(warm), seed)


def _whole_number(body: Mapping[str, Any], key: str, default: int, least: int) -> int:
    value = body.get(key)
    if value is None:
        return default
    if type(value) is not int or not least <= value < 2**63:
        raise ApiError(400, f"{key}={value} is no whole number from {least} on")
    return value


def stops_of(body: Mapping[str, Any]) -> list[str]:
    """Strings that end the answer."""
    stop = body.get("stop")
    found = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(found, list) or len(found) > 4 or not all(isinstance(one, str) for one in found):
        raise ApiError(400, "stop is a string or a list of at most four")
    return found
