"""The llama.cpp engine: answers from a ``.gguf`` file, through llama.cpp's own server in a child process."""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
import time
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llm_at_home.errors import Refusal
from llm_at_home.generation.llama_server import LocalServer
from llm_at_home.generation.reply import Reply, Sampling
from llm_at_home.models.chat import ensure_chat_template
from llm_at_home.quantization.gguf_file import GGUFFile, kernel

# The stream names no ids for the bytes of a character that is not whole yet; see :class:`_Stream`.
UNKNOWN_TOKEN = -1
SEEDS = 2**32 - 1  # the last one means "any" to llama.cpp
TIMEOUT_S = 3600.0


def load(config: Mapping[str, Any], options: Mapping[str, Any]) -> LlamaCppEngine:
    """The engine over the file of a resolved configuration with ``quant=gguf``, made first if need be.

    A file that was made here is asked with the tokenizer of its transformers model; one that was given with
    ``quant.path`` with its own.

    Args:
        config: resolved.
        options: of the engine, with ``_target_``.
    """
    from hydra.utils import instantiate

    from llm_at_home.models.loading import load_tokenizer
    from llm_at_home.quantization import gguf

    path = gguf.ensure(config)
    tokenizer = None if config["quant"]["path"] else load_tokenizer(config["model"])
    on_gpu = config["gpu"]["device"] == "cuda"
    engine = instantiate(options, gguf=path, tokenizer=tokenizer, on_gpu=on_gpu, _convert_="object")
    if tokenizer is None:
        engine.tokenizer = FileTokenizer(engine)
        ensure_chat_template(engine.tokenizer, config["model"]["chat_template"], config["model"]["name"])
    engine.kernel, engine.size = engine.describe(), gguf.size_readings(engine.file)
    return engine


class LlamaCppEngine:
    """Answers with llama.cpp. Prompts go in as token ids, and nothing of an earlier prompt is reused.

    Args:
        gguf: the model file.
        tokenizer: of transformers, or None for a file that is asked with its own (:class:`FileTokenizer`).
        max_new_tokens: the longest answer, in tokens.
        temperature: for every question, or None for the published one of its category.
        batch_size: conversations answered at once; each has ``context`` tokens of key-value cache.
        warmup_tokens: decoded before anything is measured.
        context: tokens of prompt and answer together; no more than the model was made for.
        threads: CPU threads; None leaves the choice to llama.cpp, which takes one for each physical core.
        on_gpu: whether the model is to run on a GPU.

    Raises:
        Refusal: for a file that llama.cpp cannot load, or a GPU that this build of llama.cpp cannot use.
    """

    def __init__(
        self,
        gguf: Path | str,
        tokenizer: Any,
        max_new_tokens: int,
        temperature: float | None = None,
        batch_size: int = 1,
        warmup_tokens: int = 16,
        context: int = 4096,
        threads: int | None = None,
        on_gpu: bool = False,
    ) -> None:
        self.file = GGUFFile(gguf)
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.batch_size = batch_size
        self.warmup_tokens = warmup_tokens
        self.context = min(context, self.longest)  # llama.cpp gives no more than that
        self.server = LocalServer(gguf, context=self.context, parallel=batch_size, threads=threads, on_gpu=on_gpu)
        self.server.__enter__()
        self._close = weakref.finalize(self, self.server.stop)

    @property
    def longest(self) -> int:
        """How many tokens of prompt and answer the model was made for."""
        return int(self.file.shape("context_length", sys.maxsize))

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return len(self.file.metadata["tokenizer.ggml.tokens"])

    def describe(self) -> dict[str, Any]:
        """The types of the tensors that really run, with counts, and the build of llama.cpp that runs them."""
        build = self.server.build
        return kernel(
            self.file,
            {
                "backend": f"llama.cpp (xllamacpp {metadata.version('xllamacpp')})",
                "devices": build["gpus"] or ["CPU"],
                "system": build["system"],
                "threads": build["threads"],
                "kv_cache": "float16",
                "context": self.context,
            },
        )

    def close(self) -> None:
        """End the server; a second time does nothing."""
        self._close()

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

        Raises:
            Refusal: for a prompt that the context cannot hold.
            MemoryError: when the kernel ended the server for want of memory.
            RuntimeError: when it ended otherwise, or could not answer.
        """
        stream = _Stream(self._token_ids)
        stopped = False
        with contextlib.closing(self._events(prompt, sampling)) as events:
            for event in events:
                stream.add(event, time.perf_counter())
                if on_text and event["content"]:
                    on_text(event["content"])
                if should_stop and not event["stop"] and should_stop():
                    stopped = True
                    break
        return Reply(
            text="".join(stream.texts).strip(),
            tokens=stream.tokens,
            prompt_tokens=len(prompt),
            finish_reason="stopped" if stopped else "length" if stream.stop_type == "limit" else "stop",
            time_to_first_token=stream.first,
            intervals=stream.intervals,
        )

    def reply_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Reply]:
        """Answer several prompts at once, ``batch_size`` at a time; each draws from a seed of its own.

        The time to the first token is the batch's: that of its last prompt to be read.
        """
        seeds = [(sampling.seed + i) % SEEDS for i in range(len(prompts))]
        with ThreadPoolExecutor(len(prompts)) as pool:
            replies = list(pool.map(lambda p, seed: self.reply(p, _seeded(sampling, seed)), prompts, seeds))
        firsts = [reply.time_to_first_token for reply in replies if reply.time_to_first_token is not None]
        for reply in replies:
            reply.time_to_first_token = max(firsts, default=None)
        return replies

    def ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The server's answer to one request that does not stream."""
        with _Request(self, path, body) as response:
            return json.loads(response.read())

    def _token_ids(self, text: str) -> list[int]:
        return self.ask("/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"]

    @staticmethod
    def _body(prompt: Sequence[int], sampling: Sampling) -> dict[str, Any]:
        return {
            "prompt": list(prompt),
            "n_predict": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "samplers": ["temperature"],  # the whole distribution: no top-k, no top-p, no penalties
            "seed": sampling.seed % SEEDS,
            "ignore_eos": sampling.ignore_eos,
            "cache_prompt": False,
            "return_tokens": True,
            "stream": True,
        }

    def _events(self, prompt: Sequence[int], sampling: Sampling) -> Generator[dict[str, Any], None, None]:
        with _Request(self, "/completion", self._body(prompt, sampling)) as response:
            for line in response:
                if line.startswith(b"data: "):
                    event = json.loads(line.removeprefix(b"data: "))
                    yield event
                    if event["stop"]:
                        return
                elif line.startswith(b"error: "):
                    raise RuntimeError(f"llama.cpp: {json.loads(line.removeprefix(b'error: '))['message']}")
        raise self.server.ending() or RuntimeError("llama.cpp's server broke off its answer")


def _seeded(sampling: Sampling, seed: int) -> Sampling:
    return Sampling(sampling.max_new_tokens, sampling.temperature, seed, sampling.ignore_eos)


class _Stream:
    """Gathers tokens and times from the pieces of a stream.

    llama.cpp sends a piece for each token, but for the bytes of a character that is not whole yet: they come with the
    token that completes it, as a count. Their ids are those that the character is made of, where the counts agree, and
    else unknown; the time since the piece before is shared out among them.

    Args:
        token_ids: the file's tokenizer.
    """

    def __init__(self, token_ids: Callable[[str], list[int]]) -> None:
        self.tokens: list[int] = []
        self.texts: list[str] = []
        self.intervals: list[float] = []
        self.first: float | None = None
        self.stop_type = ""
        self._token_ids = token_ids
        self._start = self._last = time.perf_counter()

    def add(self, event: Mapping[str, Any], now: float) -> None:
        """One piece; the last one says how the answer ended."""
        count = event["tokens_predicted"] - len(self.tokens)
        self.stop_type = event.get("stop_type", "")
        self.texts.append(event["content"])
        if count <= 0:
            return
        self.tokens += event["tokens"] if count == len(event["tokens"]) else self._hidden(event, count)
        if self.first is None:
            self.first = now - self._start  # of further tokens in the first piece, the times are not known
        else:
            self.intervals += [(now - self._last) / count] * count
        self._last = now

    def _hidden(self, event: Mapping[str, Any], count: int) -> list[int]:
        known = list(event["tokens"])
        whole = self._token_ids(event["content"]) if event["content"] else []
        if len(whole) == count and whole[-len(known) :] == known:
            return whole
        return [UNKNOWN_TOKEN] * (count - len(known)) + known


class _Request:
    """One request to the server; leaving it early closes the connection, which makes the server stop."""

    def __init__(self, engine: LlamaCppEngine, path: str, body: Mapping[str, Any]) -> None:
        address = urlsplit(engine.server.base_url)
        self._server, self._longest = engine.server, engine.longest
        self._connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=TIMEOUT_S)
        self._path = path
        self._body = json.dumps(body)

    def __enter__(self) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._server.api_key}"}
        try:
            self._connection.request("POST", self._path, self._body, headers)
            response = self._connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise self._server.ending() or error from error
        if response.status != 200:
            problem = json.loads(response.read())["error"]
            self._connection.close()
            if problem.get("type") == "exceed_context_size_error":
                needed, held = problem["n_prompt_tokens"], problem["n_ctx"]
                hint = "raise it" if held < self._longest else "the model takes no more, so ask it something shorter"
                raise Refusal(f"a prompt of {needed} tokens is longer than engine.context={held}: {hint}")
            raise RuntimeError(f"llama.cpp: {problem['message']}")
        return response

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._connection.close()
        if isinstance(error, (OSError, http.client.HTTPException)):
            raise self._server.ending() or error from error


class FileTokenizer:
    """The tokenizer of a ``.gguf`` file, as llama.cpp reads it, with what the engines ask of a transformers tokenizer.

    Args:
        engine: over the file.
    """

    def __init__(self, engine: LlamaCppEngine) -> None:
        self._engine = engine
        self.chat_template = engine.file.metadata.get("tokenizer.chat_template")

    def _special(self, name: str) -> str:
        known = self._engine.file.metadata
        number = known.get(f"tokenizer.ggml.{name}_token_id")
        return "" if number is None else known["tokenizer.ggml.tokens"][number]

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool = False, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as text."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[messages],
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            bos_token=self._special("bos"),
            eos_token=self._special("eos"),
        )
        return rendered[0][0]

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Token ids of a text; marks such as ``<|im_start|>`` are one token."""
        body = {"content": text, "add_special": add_special_tokens, "parse_special": True}
        return {"input_ids": self._engine.ask("/tokenize", body)["tokens"]}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, marks included."""
        return self._engine.ask("/detokenize", {"tokens": list(ids)})["content"]
