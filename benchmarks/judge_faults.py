"""The ``openai`` path of the judge against a real server and a faulty one: what is asked, tried again, missing, paid.

    python benchmarks/judge_faults.py --out results/two_core_cpu/judge_faults
    python benchmarks/judge_faults.py --table results/two_core_cpu/judge_faults

``real`` is llama.cpp's server with the embedded model, which writes its judgments freely, so that some hold no rating;
``real_expected`` asks the same server for expected ratings.
``faulty`` serves in turn 429 with ``Retry-After: 1``, 500, text that is no JSON, silence, a reply without a rating, a
connection that breaks off, and a rating. Both judge the reference answers of home_bench's first questions, from a file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import rows as common

from llm_at_home.data.questions import load_questions
from llm_at_home.evaluation.judge.local import LocalServer, find_gguf
from llm_at_home.records import store

QUESTIONS = 4
TIMEOUT_S = 4
KEY = "JUDGE_BENCHMARK_KEY"
PRICES = ["judge.prices.input=30", "judge.prices.output=60", "judge.prices.source='list of gpt-4, 2023-06'"]
TABLE = (
    ("judgments", "judgments"),
    ("judgments_missing", "missing"),
    ("judge_calls", "calls"),
    ("judge_retries", "retries"),
    ("judge_failures", "given up"),
    ("judge_prompt_tokens", "prompt tokens"),
    ("judge_completion_tokens", "reply tokens"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return 0
    if not args.out:
        parser.error("give --out or --table")
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "references.jsonl"
        answers.write_text("".join(json.dumps(row) + "\n" for row in references()))
        for name, serve in SERVERS.items():
            if common.status(args.out / name) not in common.DONE:
                print(serve(name, answers, args.out), flush=True)
    return int(any(common.status(args.out / name) != "ok" for name in SERVERS))


def references() -> list[dict]:
    """The reference answers as a model's."""
    return [
        {"question_id": q.question_id, "model_id": "references", "choices": [{"index": 0, "turns": q.reference}]}
        for q in load_questions("home_bench", limit=QUESTIONS)
    ]


def real(name: str, answers: Path, out: Path) -> str:
    """llama.cpp's own server."""
    with LocalServer(find_gguf(), context=4096, threads=1) as server:
        os.environ[KEY] = server.api_key
        words = [f"judge.api_key_env={KEY}", "judge.model=SmolLM2-135M-Instruct.Q4_1", "judge.max_tokens=64"]
        words += ["judge.rating=expected"] if name.endswith("expected") else []
        return judge(name, answers, out, server.base_url, *words)


def faulty(name: str, answers: Path, out: Path) -> str:
    """A server that fails in every way in turn."""
    number, guard = itertools.count(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            with guard:
                turn = next(number) % 7
            if turn == 3:
                time.sleep(2 * TIMEOUT_S)
            elif turn == 5:
                self.reply(200, b'{"id": "1", "cho', promised=1000)
            else:
                said = [completion("Lovely."), completion("Rating: [[6]]")][turn == 6]
                status, body = {0: (429, b"{}"), 1: (500, b"{}"), 2: (200, b"<html>busy</html>")}.get(turn, (200, said))
                self.reply(status, body, **({"Retry-After": "1"} if turn == 0 else {}))

        def reply(self, status: int, body: bytes, promised: int | None = None, **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(promised or len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    return judge(
        name, answers, out, address, "judge.model=faulty", *PRICES, "judge.max_retries=4", "judge.max_tokens=64"
    )


def completion(text: str) -> bytes:
    """A chat completion."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 300, "completion_tokens": 5, "total_tokens": 305}
    body = {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "faulty",
        "choices": [choice],
        "usage": usage,
    }
    return json.dumps(body).encode()


def judge(name: str, answers: Path, out: Path, address: str, *more: str) -> str:
    """One run of evaluate.py against a server, its record kept."""
    words = ["evaluate.py", "judge=server", f"judge.base_url={address}", f"answers={answers}", "questions=home_bench"]
    words += [f"limit={QUESTIONS}", "judge.concurrency=1", "logger=none", "judge.cache=false"]
    words += [f"judge.timeout_s={TIMEOUT_S}"] if name == "faulty" else []
    return common.run_row(name, [*words, *more], out, ("judge_score_mean", "judge_cost"))


def table(folder: Path) -> str:
    """The table of docs/judging.md."""
    lines = [["server", *(title for _, title in TABLE), "cost (USD)"]]
    for name in SERVERS:
        if common.status(folder / name) == "ok":
            record = store.load(folder / name)
            counts = [f"{record.counts[key]:,}" for key, _ in TABLE]
            lines.append([name.replace("_", ", "), *counts, common.text(record.readings["judge_cost"], 4)])
    return common.markdown(lines)


SERVERS = {"real": real, "real_expected": real, "faulty": faulty}

if __name__ == "__main__":
    sys.exit(main())
