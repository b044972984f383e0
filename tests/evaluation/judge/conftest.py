"""A judge's server that fails on demand, over real HTTP on loopback, and tiny templates to ask it with."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

Action = Callable[[BaseHTTPRequestHandler], None]


def _completion(text: str | None, finish_reason: str = "stop") -> dict[str, Any]:
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "served-snapshot",
        "choices": [
            {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}},
        ],
        "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14},
    }


class ScriptedServer:
    """Serves one scripted action a request, in order, and ``default`` when the script is used up."""

    def __init__(self) -> None:
        self.script: list[Action] = []
        self.default: Callable[[dict[str, Any]], Action] = lambda body: self.say("Rating: [[7]]")
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self._guard = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._guard:
                    outer.bodies.append(body)
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                    action = outer.script.pop(0) if outer.script else None
                (action or outer.default(body))(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    @staticmethod
    def say(text: str | None, finish_reason: str = "stop") -> Action:
        """A well-formed reply."""
        return ScriptedServer.fail(200, _completion(text, finish_reason))

    @staticmethod
    def fail(status: int, body: Any = None, **headers: str) -> Action:
        """Any status with any body; ``retry_after="1"`` becomes the header."""

        def act(handler: BaseHTTPRequestHandler) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
            handler.send_response(status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(data)))
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.end_headers()
            handler.wfile.write(data)

        return act

    @staticmethod
    def hang(seconds: float) -> Action:
        """Silence."""
        return lambda handler: time.sleep(seconds)

    @staticmethod
    def drop_mid_body() -> Action:
        """Promise 1000 bytes, send a few, and close the connection."""

        def act(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"id": "1", "choi')
            handler.close_connection = True

        return act


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    scripted = ScriptedServer()
    yield scripted
    scripted.close()


@pytest.fixture
def templates_file(tmp_path: Path) -> Path:
    """Templates of our own in FastChat's format; each prompt starts with its name."""
    first = {"single": "{question}|{answer}", "pair": "{question}|{answer_a}|{answer_b}"}
    both = {
        "single": "{question_1}|{answer_1}|{question_2}|{answer_2}",
        "pair": "{question_1}|{answer_a_1}|{answer_b_1}|{question_2}|{answer_a_2}|{answer_b_2}",
    }
    rows = []
    for kind, stems in (("single", ("single-v1", "single-math-v1")), ("pair", ("pair-v2", "pair-math-v1"))):
        for stem in stems:
            for turn in (1, 2):
                name = stem + ("-multi-turn" if turn == 2 else "")
                prompt = f"{name}: " + (first if turn == 1 else both)[kind]
                if "math" in stem:
                    prompt += "".join(f"|ref={{ref_answer_{number}}}" for number in range(1, turn + 1))
                rows.append(
                    {
                        "name": name,
                        "type": "pairwise" if kind == "pair" else "single",
                        "system_prompt": "Judge.",
                        "prompt_template": prompt,
                        "output_format": "[[A]]" if kind == "pair" else "[[rating]]",
                    }
                )
    path = tmp_path / "judge_prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def questions() -> list[SimpleNamespace]:
    """Three questions of two turns; 2 and 3 have references, and only the category of 2 shows them."""
    return [
        SimpleNamespace(question_id=1, category="writing", turns=["w1?", "w2?"], reference=None),
        SimpleNamespace(question_id=2, category="math", turns=["m1?", "m2?"], reference=["4", "5"]),
        SimpleNamespace(question_id=3, category="stem", turns=["s1?", "s2?"], reference=["x", "y"]),
    ]


def _answer(question_id: int, model: str) -> dict[str, Any]:
    return {
        "question_id": question_id,
        "answer_id": f"{model}-{question_id}",
        "model_id": model,
        "choices": [{"index": 0, "turns": [f"{model} {question_id}.1", f"{model} {question_id}.2"]}],
        "tstamp": 1.0,
    }


@pytest.fixture
def answers() -> list[dict[str, Any]]:
    return [_answer(number, "ours") for number in (1, 2, 3)]


@pytest.fixture
def baseline() -> list[dict[str, Any]]:
    return [_answer(number, "base") for number in (1, 2, 3)]


@pytest.fixture
def config(server: ScriptedServer, templates_file: Path) -> dict[str, Any]:
    """A judge behind the scripted server."""
    return {
        "name": "server",
        "model": "judge-snapshot-1",
        "base_url": server.base_url,
        "api_key_env": None,
        "temperature": 0,
        "max_tokens": 64,
        "timeout_s": 5,
        "max_retries": 0,
        "concurrency": 2,
        "mode": "single",
        "templates": str(templates_file),
        "extra_body": {},
        "grammar": None,
        "rating": "reply",
        "repeats": 1,
        "references": None,
        "requests_per_minute": None,
        "tokens_per_minute": None,
        "max_cost_usd": None,
        "prices": {"input": None, "output": None, "source": None, "batch_share": None},
        "batch": False,
        "cache": False,
        "dry_run": False,
    }


class BatchServer(ScriptedServer):
    """OpenAI's files and batches beside the chat endpoint: a batch is answered at the second look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.answer: Callable[[dict[str, Any]], str | None] = lambda body: "Rating: [[7]]"
        outer = self
        handler = self._http.RequestHandlerClass
        chat = handler.do_POST

        def post(request: BaseHTTPRequestHandler) -> None:
            if request.path == "/v1/files":
                data = request.rfile.read(int(request.headers["Content-Length"]))
                content = next(part for part in data.split(b"\r\n\r\n") if part.startswith(b'{"custom_id"'))
                outer.files["file-1"] = content.rsplit(b"\r\n--", 1)[0].split(b"\r\n")[0]
                body = {
                    "id": "file-1",
                    "object": "file",
                    "bytes": 1,
                    "created_at": 1,
                    "filename": "f",
                    "purpose": "batch",
                }
                outer.fail(200, {**body, "status": "processed"})(request)
            elif request.path == "/v1/batches":
                asked = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
                outer.batches["batch-1"] = {
                    "id": "batch-1",
                    "object": "batch",
                    "endpoint": asked["endpoint"],
                    "input_file_id": asked["input_file_id"],
                    "completion_window": asked["completion_window"],
                    "created_at": 1,
                    "status": "in_progress",
                }
                outer.fail(200, outer.batches["batch-1"])(request)
            else:
                chat(request)

        def get(request: BaseHTTPRequestHandler) -> None:
            if request.path == "/v1/files/out-1/content":
                outer.fail(200, outer.files["out-1"])(request)
                return
            batch = outer.batches["batch-1"]
            outer._answer_all()
            batch |= {"status": "completed", "output_file_id": "out-1"}
            outer.fail(200, batch)(request)

        handler.do_POST, handler.do_GET = post, get  # type: ignore[attr-defined]

    def _answer_all(self) -> None:
        lines = []
        for line in self.files["file-1"].splitlines():
            asked = json.loads(line)
            self.bodies.append(asked["body"])
            text = self.answer(asked["body"])
            response = (
                {"status_code": 500, "body": {}} if text is None else {"status_code": 200, "body": _completion(text)}
            )
            lines.append(json.dumps({"custom_id": asked["custom_id"], "response": response}))
        self.files["out-1"] = "\n".join(lines).encode()


@pytest.fixture
def batch_server() -> Iterator[BatchServer]:
    scripted = BatchServer()
    yield scripted
    scripted.close()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test finds another's replies."""
    path = tmp_path / "cache" / "replies.sqlite"
    monkeypatch.setattr("llm_at_home.evaluation.judge.grading.cache_path", lambda: path)
    return path
