"""The rating page over HTTP: what a rater gets to see, and how a grade comes in."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from llm_at_home.human import links
from llm_at_home.human.study import GRADES, Page, Study

log = logging.getLogger("llm_at_home")

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

HERE = Path(__file__).parent
MAX_COMMENT = 2000  # characters
MAX_BODY = 64 * 1024  # bytes: a comment of the longest characters, percent-encoded, and some room
_ENDS = {1: "useless", 5: "perfect"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    # The link is a secret, so no other site may learn it.
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex, nofollow",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


def make_app(study: Study) -> Any:
    """The ASGI application that serves one study."""
    pages = _Pages(study)
    app = Starlette(
        routes=[
            Mount("/static", StaticFiles(directory=HERE / "static")),
            Route("/r/{token}", pages.without_slash),
            Route("/r/{token}/", pages.overview),
            Route("/r/{token}/{position:int}", pages.item),
            Route("/r/{token}/{position:int}", pages.grade, methods=["POST"]),
        ],
        exception_handlers={HTTPException: pages.failure, sqlite3.Error: pages.storage_failure},
        max_body_size=MAX_BODY,
    )
    app.router.redirect_slashes = False  # it would answer with a link's secret before it is checked
    return _Hardened(app)


class _Pages:
    def __init__(self, study: Study) -> None:
        self._study = study
        self._raters = study.raters
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    async def overview(self, request: Request) -> Response:
        """What there is to do, how far the rater is, and a way to each answer."""
        rater = self._rater(request)
        items = await run_in_threadpool(self._study.items, rater)
        left = [item.position for item in items if item.grade is None]
        return self._html("overview.html.jinja", rater=rater, items=items, left=left, static=_static(request))

    async def without_slash(self, request: Request) -> Response:
        """A link that lost its end on the way."""
        self._rater(request)
        return RedirectResponse(f"{request.path_params['token']}/", 307)

    async def item(self, request: Request) -> Response:
        """One answer to read and grade."""
        rater = self._rater(request)
        return self._item(request, rater, await self._page(request, rater))

    async def grade(self, request: Request) -> Response:
        """Keep a grade; the reply comes after it is on disk."""
        rater = self._rater(request)
        page = await self._page(request, rater)
        form = await _form(request)
        _refuse_forgery(request, form, links.form_token(self._study.secret, rater))
        comment = form.get("comment", "").replace("\r\n", "\n").replace("\0", "").strip()
        grade, problem = _grade(form.get("grade", ""), comment)
        if not problem and grade is None and not comment and page.item.grade is None and not page.item.comment:
            problem = "Choose a grade from 1 to 5 first."
        wants_json = "application/json" in request.headers.get("accept", "")
        if problem:
            if wants_json:
                return JSONResponse({"problem": problem}, 422)
            return self._item(request, rater, page, problem, comment, status=422)
        done = await run_in_threadpool(self._study.save, rater, page.item.position, grade, comment)
        if wants_json:
            return JSONResponse({"graded": done, "of": page.items})
        return RedirectResponse(_next(page), 303)

    async def failure(self, request: Request, error: Exception) -> Response:
        """A page with one sentence, or the sentence alone."""
        assert isinstance(error, HTTPException)
        text = {
            404: "There is nothing at this address. Open your own link, as it was given to you.",
            413: f"This is too long to be kept. A comment may have {MAX_COMMENT} characters.",
        }.get(error.status_code, error.detail)
        if "application/json" in request.headers.get("accept", ""):
            return JSONResponse({"problem": text}, error.status_code)
        context = {"text": text, "static": _static(request)}
        return self._html("failure.html.jinja", status=error.status_code, **context)

    async def storage_failure(self, request: Request, error: Exception) -> Response:
        """What the page says when a grade could not be written: it was not kept."""
        log.error("the study could not be read or written: %s", error)
        return await self.failure(request, HTTPException(503, "Not saved: the server cannot write now. Try again."))

    def _item(
        self, request: Request, rater: int, page: Page, problem: str = "", comment: str | None = None, status: int = 200
    ) -> Response:
        return self._html(
            "item.html.jinja",
            status,
            page=page,
            comment=page.item.comment if comment is None else comment,
            form_token=links.form_token(self._study.secret, rater),
            problem=problem,
            previous=page.item.position - 1 if page.item.position > 1 else "./",
            next=_next(page),
            grades=[(grade, _ENDS.get(grade)) for grade in GRADES],
            max_comment=MAX_COMMENT,
            static=_static(request),
        )

    def _rater(self, request: Request) -> int:
        rater = links.rater_of(self._study.secret, request.path_params["token"], self._raters)
        if rater is None:
            raise HTTPException(404)
        return rater

    async def _page(self, request: Request, rater: int) -> Page:
        page = await run_in_threadpool(self._study.page, rater, request.path_params["position"])
        if page is None:
            raise HTTPException(404)
        return page

    def _html(self, template: str, status: int = 200, **context: Any) -> Response:
        return HTMLResponse(self._templates.get_template(template).render(context), status)


class _Hardened:
    """Adds the headers to every response, also to those of an error inside."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        cached = scope.get("path", "").startswith("/static/")
        headers = {**_HEADERS, "Cache-Control": "no-cache" if cached else "no-store"}

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _static(request: Request) -> str:
    """The way there from the page that was asked for; relative, since a proxy may put a folder before all of it."""
    return "../" * (request.url.path.count("/") - 1) + "static"


def _next(page: Page) -> str:
    """The next address, relative to an item's; after the last one the overview."""
    return str(page.item.position + 1) if page.item.position < page.items else "./"


async def _form(request: Request) -> dict[str, str]:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise HTTPException(415, "A grade comes as a form.")
    body = await request.body()
    try:
        fields = parse_qs(
            body.decode("ascii"), keep_blank_values=True, strict_parsing=True, max_num_fields=8, errors="strict"
        )
    except ValueError:
        raise HTTPException(400, "This form cannot be read.") from None
    return {name: values[-1] for name, values in fields.items()}


def _refuse_forgery(request: Request, form: dict[str, str], expected: str) -> None:
    """Refuse a form that another site sent.

    The Origin header is of no use here: with the referrer policy of these pages, browsers send "null" with a form.
    """
    foreign = request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
    if foreign or not links.same(form.get("form_token", ""), expected):
        raise HTTPException(403, "This form is not from your own page: open your link again.")


def _grade(text: str, comment: str) -> tuple[int | None, str]:
    """The grade, and what is wrong with the form ("" when nothing is)."""
    if len(comment) > MAX_COMMENT:
        return None, f"The comment has {len(comment)} characters, and {MAX_COMMENT} is the most."
    if text in {str(grade) for grade in GRADES}:
        return int(text), ""
    if text:
        return None, "A grade is a whole number from 1 to 5."
    return None, ""
