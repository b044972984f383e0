"""The endpoint under many streams at once: time to the first token, and between tokens.

    python benchmarks/serve.py --out FOLDER --streams 32 -- engine=graph engine.batch_size=32 quant=gptq
    python benchmarks/serve.py --out FOLDER --streams 4 --tokens 16 -- engine=graph engine.batch_size=4
    python benchmarks/serve.py --out FOLDER --streams 32 -- quant=gguf quant.type=Q8_0 engine.batch_size=8
    python benchmarks/serve.py --shape FOLDER   # then: -- model=custom model.source=FOLDER model.weights=random ...
    python benchmarks/serve.py --table FOLDER

Starts ``infer.py mode=serve`` with the words after ``--``, asks it through the ``openai`` client, every stream a
question of its own, twice, and ends it. The first pass warms it up, with answers that end in turn. A stream that leaves
after its first token is among them, and the endpoint must be idle afterwards. Times are the client's, each piece of
text a token or a few. Every stream has a process: the client takes 0.4 ms for a piece, and threads, which take turns,
would be what is timed.
``--shape`` writes a folder with Llama-2-7B's configuration and the embedded model's tokenizer, which with random
weights serves noise at a 7B's speed.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import rows as common

from llm_at_home.metering.timing import percentile
from llm_at_home.records.provenance import collect

QUESTION = "Write a paragraph about the number {}, and about what people have seen in it."


def ask(address: str, model: str, number: int, tokens: int) -> dict[str, Any]:
    """One stream: when its first piece of text came, the times between pieces, and how many tokens it had."""
    import openai

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0, timeout=600)
    messages: Any = [{"role": "user", "content": QUESTION.format(number)}]
    start = last = time.perf_counter()
    first, between, count = None, [], 0
    stream = client.chat.completions.create(
        model=model, messages=messages, max_tokens=tokens, stream=True, stream_options={"include_usage": True}
    )
    for piece in stream:
        now = time.perf_counter()
        if piece.usage:
            count = piece.usage.completion_tokens
        if not piece.choices or not piece.choices[0].delta.content:
            continue
        if first is None:
            first = now - start
        else:
            between.append(now - last)
        last = now
    return {"first": first, "between": between, "tokens": count}


def leave(address: str, model: str) -> None:
    """A client that goes away after its first piece."""
    import openai

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0, timeout=600)
    messages: Any = [{"role": "user", "content": QUESTION.format("zero")}]
    stream = client.chat.completions.create(model=model, messages=messages, stream=True)
    next(iter(stream))
    stream.close()


def look(address: str, path: str) -> Any:
    with urllib.request.urlopen(address + path, timeout=60) as answer:
        return json.loads(answer.read())


def at_work(address: str) -> int:
    """Requests that are being answered or wait, by our own endpoint's word or by llama.cpp's slots."""
    health = look(address, "/health")
    if "running" in health:
        return int(health["running"] + health["waiting"])
    return sum(slot["is_processing"] for slot in look(address, "/slots"))


def write_shape(folder: Path) -> None:
    """Llama-2-7B's configuration with the embedded model's vocabulary, and that model's tokenizer."""
    import yaml
    from transformers import AutoConfig, AutoTokenizer

    from llm_at_home.models.embedded import ensure_converted

    tokenizer = AutoTokenizer.from_pretrained(ensure_converted())
    shape = yaml.safe_load((common.ROOT / "conf/model/llama2_7b.yaml").read_text())["architecture"]
    AutoConfig.for_model(**(shape | {"vocab_size": len(tokenizer)})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Start the endpoint, ask, and end it."""
    address = f"http://127.0.0.1:{args.port}"
    words = ["infer.py", "mode=serve", "logger=none", f"serve.port={args.port}", f"serve.queue={args.streams + 1}"]
    begun = time.perf_counter()
    child = subprocess.Popen([sys.executable, *words, *args.overrides], cwd=common.ROOT)
    try:
        while True:
            try:
                look(address, "/health")
                break
            except OSError:
                if child.poll() is not None:
                    sys.exit(f"the endpoint ended with exit code {child.returncode}")
                time.sleep(0.2)
        ready = time.perf_counter() - begun
        model = look(address, "/v1/models")["data"][-1]["id"]
        asking = partial(ask, address, model)
        streams = range(1, args.streams + 1)
        in_turn = [max(1, args.tokens * number // args.streams) for number in streams]
        with ProcessPoolExecutor(args.streams + 1, initializer=import_module, initargs=("openai",)) as pool:
            for lengths in (in_turn, [args.tokens] * args.streams):
                start = time.perf_counter()
                left = pool.submit(leave, address, model)
                found = list(pool.map(asking, streams, lengths))
                seconds = time.perf_counter() - start
                left.result()
        end = time.monotonic() + 30
        while (left_running := at_work(address)) and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        child.send_signal(signal.SIGINT)
        child.wait(60)
    firsts = [one["first"] for one in found if one["first"] is not None]
    between = [seconds for one in found for seconds in one["between"]]
    tokens = sum(one["tokens"] for one in found)
    return {
        "words": args.overrides,
        "model": model,
        "streams": args.streams,
        "tokens_each": args.tokens,
        "client": "a process for each stream",
        "provenance": collect(),
        "seconds_until_ready": ready,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "time_to_first_token": {f"p{p}": percentile(firsts, p / 100) for p in (50, 99)},
        "between_pieces": {f"p{p}": percentile(between, p / 100) for p in (50, 99)},
        "left_running": left_running,
        "exit_code": child.returncode,
    }


def table(folder: Path) -> str:
    """The results of a folder as Markdown."""
    titles = ["served with", "streams", "tokens each", "ready after (s)", "tokens/s, all together"]
    titles += ["first token, p50 (s)", "p99", "between tokens, p50 (s)", "p99", "left running"]
    lines = [titles]
    for file in sorted(folder.glob("*.json")):
        one = json.loads(file.read_text())
        times = [one[key][p] for key in ("time_to_first_token", "between_pieces") for p in ("p50", "p99")]
        lines.append(
            [
                " ".join(one["words"]),
                *(str(one[key]) for key in ("streams", "tokens_each")),
                f"{one['seconds_until_ready']:.1f}",
                f"{one['tokens_per_second']:,.1f}",
                *(f"{seconds:.3f}" for seconds in times),
                str(one["left_running"]),
            ]
        )
    return common.markdown(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="measure, and write NAME.json into this folder")
    what.add_argument("--shape", type=Path, metavar="FOLDER", help="write Llama-2-7B's shape with a tokenizer")
    what.add_argument("--table", type=Path, metavar="FOLDER", help="print the table of such a folder")
    parser.add_argument("--name", default="serve", help="of the file (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer, at most (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("overrides", nargs="*", help="after --: how to serve")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return 0
    if args.shape:
        write_shape(args.shape)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.name}.json").write_text(json.dumps(measure(args), indent=1) + "\n")
    print(table(args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
