"""OpenAI's chat completions over HTTP, as a Starlette application; errors have OpenAI's form."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llm_at_home.generation.reply import OTHER_TEMPERATURE, Sampling
from llm_at_home.generation.serving.scheduler import Busy, Request, Scheduler
from llm_at_home.models.chat import prompt_ids

LARGEST_BODY = 1_000_000  # bytes
ROLES = ("system", "developer", "user", "assistant")
# What would change the answer, and is not done: asked for, it is an error and not silently left out.
NOT_DONE = {"n": 1, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "tools": None}


class ApiError(Exception):
    """What the asker is told.

    Args:
        status: of HTTP.
        message: in one sentence.
        headers: further ones.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


@dataclass(frozen=True)
class Service:
    """What is served.

    Args:
        scheduler: which decodes.
        models: adapters by the name that askers use; None is the base alone.
        api_key: that askers must show, or None.
        max_new_tokens: the longest answer.
        temperature: where the asker names none.
    """

    scheduler: Scheduler
    models: Mapping[str, str | None]
    api_key: str | None
    max_new_tokens: int
    temperature: float = OTHER_TEMPERATURE


def application(service: Service) -> Starlette:
    """The endpoint: ``/v1/chat/completions``, ``/v1/models`` and ``/health``."""

    async def health(request: HttpRequest) -> Response:
        running, waiting = service.scheduler.load
        return JSONResponse({"status": "ok", "running": running, "waiting": waiting})

    async def models(request: HttpRequest) -> Response:
        _authorize(request, service.api_key)
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "llm-at-home"} for name in service.models]
        return JSONResponse({"object": "list", "data": data})

    async def completions(request: HttpRequest) -> Response:
        _authorize(request, service.api_key)
        body = await _body(request)
        return await _complete(service, request, body)

    async def failed(request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        content = {"error": {"message": error.message, "type": kind, "param": None, "code": None}}
        return JSONResponse(content, error.status, error.headers)

    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/chat/completions", completions, methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={ApiError: failed})


def _authorize(request: HttpRequest, api_key: str | None) -> None:
    shown = request.headers.get("authorization", "").removeprefix("Bearer ")
    if api_key is not None and not secrets.compare_digest(shown.encode(), api_key.encode()):
        raise ApiError(401, "the API key is missing or wrong")


async def _body(request: HttpRequest) -> dict[str, Any]:
    """The body as JSON; a larger one than allowed is not read to its end."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > LARGEST_BODY:
            raise ApiError(413, f"the request is larger than {LARGEST_BODY:,} bytes")
        parts.append(part)
    try:
        found = json.loads(b"".join(parts))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ApiError(400, "the request is no JSON object")
    return found


async def _complete(service: Service, http: HttpRequest, body: Mapping[str, Any]) -> Response:
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[str | tuple[str, int]] = asyncio.Queue()

    def put(item: str | tuple[str, int]) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, item)

    name = _model(service, body)
    prompt = await asyncio.to_thread(_prompt, service, body)
    request = Request(
        prompt,
        _sampling(service, body, len(prompt)),
        service.models[name],
        on_text=put,
        on_end=lambda reason, count: put((reason, count)),
        stops=_stops(body),
    )
    try:
        service.scheduler.submit(request)
    except Busy:
        raise ApiError(429, "too many requests wait already: try again in a while", {"Retry-After": "2"}) from None
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
    if body.get("stream"):
        usage = bool((body.get("stream_options") or {}).get("include_usage"))
        events = _events(head, request, pieces, usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    return await _whole(http, head, request, pieces)


async def _whole(http: HttpRequest, head: dict[str, Any], request: Request, pieces: Any) -> Response:
    text = ""
    try:
        while True:
            try:
                item = await asyncio.wait_for(pieces.get(), 0.5)
            except TimeoutError:
                if await http.is_disconnected():
                    return Response(status_code=499)  # nobody reads it
                continue
            if isinstance(item, str):
                text += item
                continue
            reason, count = item
            if reason == "error":
                raise ApiError(500, "the model failed")
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
            usage = _usage(request, count)
            return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})
    finally:
        request.cancelled.set()


async def _events(head: dict[str, Any], request: Request, pieces: Any, usage: bool) -> AsyncIterator[str]:
    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': choices, **more})}\n\n"

    def delta(content: dict[str, Any], reason: str | None = None) -> str:
        return event([{"index": 0, "delta": content, "finish_reason": reason}])

    try:
        yield delta({"role": "assistant", "content": ""})
        while True:
            item = await pieces.get()
            if isinstance(item, str):
                yield delta({"content": item})
                continue
            reason, count = item
            if reason == "error":
                yield f"data: {json.dumps({'error': {'message': 'the model failed', 'type': 'server_error'}})}\n\n"
                return
            yield delta({}, reason)
            if usage:
                yield event([], usage=_usage(request, count))
            yield "data: [DONE]\n\n"
            return
    finally:
        request.cancelled.set()  # a client that leaves ends this generator, and with it the answer


def _usage(request: Request, count: int) -> dict[str, int]:
    prompt = len(request.prompt)
    return {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}


def _model(service: Service, body: Mapping[str, Any]) -> str:
    name = body.get("model")
    if name not in service.models:
        raise ApiError(404, f"there is no model {name}: choose one of {', '.join(service.models)}")
    return str(name)


def _prompt(service: Service, body: Mapping[str, Any]) -> list[int]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages is missing: give a list of role and content")
    told = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if role not in ROLES or not isinstance(content, str):
            raise ApiError(400, f"a message has a role of {', '.join(ROLES)} and text as its content")
        told.append({"role": "system" if role == "developer" else role, "content": content})
    try:
        return list(prompt_ids(service.scheduler.engine.tokenizer, told))
    except Exception as error:  # templates refuse orders of roles in their own words
        raise ApiError(400, f"the model's chat template takes no such conversation: {error}") from error


def _sampling(service: Service, body: Mapping[str, Any], prompt: int) -> Sampling:
    for key, plain in NOT_DONE.items():
        if body.get(key) not in (None, plain):
            raise ApiError(400, f"{key} is not offered: leave it out")
    room = service.scheduler.context - prompt - 1
    if room < 1:
        raise ApiError(
            400, f"the conversation has {prompt} tokens, and prompt and answer together may have {room + prompt}"
        )
    asked = _number(body, "max_completion_tokens", _number(body, "max_tokens", service.max_new_tokens, 1), 1)
    temperature = _number(body, "temperature", service.temperature, 0, 2)
    seed = _number(body, "seed", secrets.randbits(31), 0)
    return Sampling(int(min(asked, room, service.max_new_tokens)), float(temperature), int(seed))


def _number(body: Mapping[str, Any], key: str, default: float, least: float, most: float = 2**63) -> float:
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < most + 1e-9:
        raise ApiError(400, f"{key}={value} is no number from {least} on" + (f" to {most}" if most < 2**62 else ""))
    return value


def _stops(body: Mapping[str, Any]) -> list[str]:
    stop = body.get("stop")
    found = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(found, list) or len(found) > 4 or not all(isinstance(one, str) for one in found):
        raise ApiError(400, "stop is a string or a list of at most four")
    return found
