"""OpenAI's chat completions over HTTP, as a Starlette application; errors have OpenAI's form."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llm_at_home.generation.reply import OTHER_TEMPERATURE
from llm_at_home.generation.serving.asked import (
    ApiError,
    check_keys,
    flag,
    prompt_of,
    sampling_of,
    stops_of,
    wants_usage,
)
from llm_at_home.generation.serving.scheduler import Busy, Request, Scheduler

LARGEST_BODY = 1_000_000  # bytes
NOBODY_THERE = 499  # the status of an answer that nobody reads
BROKEN_OFF = {"error": (500, "the model failed"), "cancelled": (503, "the server is being ended")}


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
        return JSONResponse({"object": "list", "data": [_described(name) for name in service.models]})

    async def model(request: HttpRequest) -> Response:
        _authorize(request, service.api_key)
        return JSONResponse(_described(_model(service, request.path_params["name"])))

    async def completions(request: HttpRequest) -> Response:
        _authorize(request, service.api_key)
        body = await _body(request)
        return await _complete(service, request, body)

    async def failed(request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        message = error.message.encode(errors="replace").decode()  # half a surrogate pair that somebody sent
        content = {"error": {"message": message, "type": kind, "param": None, "code": error.code}}
        return JSONResponse(content, error.status, error.headers)

    async def elsewhere(request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = f"{request.method} {request.url.path}: {error.detail.lower()}; there is POST /v1/chat/completions"
        return await failed(request, ApiError(error.status_code, said, error.headers))

    async def gone(request: HttpRequest, error: Exception) -> Response:
        return Response(status_code=NOBODY_THERE)

    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/chat/completions", completions, methods=["POST"]),
    ]
    handlers = {ApiError: failed, HTTPException: elsewhere, ClientDisconnect: gone}
    return Starlette(routes=routes, exception_handlers=handlers)


def _described(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "llm-at-home"}


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
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
            loop.call_soon_threadsafe(pieces.put_nowait, item)

    check_keys(body)
    name, stream, usage = _model(service, body.get("model")), flag(body, "stream"), wants_usage(body)
    scheduler = service.scheduler
    prompt = await asyncio.to_thread(prompt_of, scheduler.engine.tokenizer, body)
    request = Request(
        prompt,
        sampling_of(body, len(prompt), scheduler.context, service.max_new_tokens, service.temperature),
        service.models[name],
        on_text=put,
        on_end=lambda reason, count: put((reason, count)),
        stops=stops_of(body),
    )
    try:
        scheduler.submit(request)
    except Busy:
        raise ApiError(429, "too many requests wait already: try again in a while", {"Retry-After": "2"}) from None
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
    if stream:
        events = _events(head, request, pieces, usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    return await _whole(http, head, request, pieces)


async def _whole(http: HttpRequest, head: dict[str, Any], request: Request, pieces: Any) -> Response:
    text = ""
    watch = asyncio.create_task(_cancel_when_gone(http, request))
    try:
        while isinstance(item := await pieces.get(), str):
            text += item
        reason, count = item
        if watch.done():
            return Response(status_code=NOBODY_THERE)
        if reason in BROKEN_OFF:
            raise ApiError(*BROKEN_OFF[reason])
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        usage = _usage(request, count)
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})
    finally:
        watch.cancel()
        request.cancelled.set()


async def _cancel_when_gone(http: HttpRequest, request: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        continue
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
            if reason in BROKEN_OFF:
                error = {"message": BROKEN_OFF[reason][1], "type": "server_error", "param": None, "code": None}
                yield f"data: {json.dumps({'error': error})}\n\n"
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


def _model(service: Service, name: Any) -> str:
    if not isinstance(name, str):
        raise ApiError(400, f"model is no name: choose one of {', '.join(service.models)}")
    if name not in service.models:
        hint = f"choose one of {', '.join(service.models)}"
        raise ApiError(404, f"there is no model {name}: {hint}", code="model_not_found")
    return name
