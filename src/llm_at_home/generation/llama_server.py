"""llama.cpp's server with a ``.gguf`` file on a loopback port: what the llama.cpp engine and the local judge talk to.

The server is a child process. Stopping xllamacpp's in-process server while a request is under way hangs for
good, and a fault in native code would take the run with it; a child can simply be ended.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from llm_at_home.errors import Refusal
from llm_at_home.metering.memory import count_process, oom_kills, process_ends

_START_S = 300.0
_STOP_S = 5.0


@dataclass(frozen=True)
class Address:
    """Where others reach a server, and the key that they must show; without one everybody who reaches it may ask."""

    host: str
    port: int
    api_key: str | None


class LocalServer:
    """Serves a ``.gguf`` file while the context lasts: on a free port of 127.0.0.1 with a key of its own, or openly.

    The child ends with its parent, even a killed one: it watches the pipe between them.

    Args:
        gguf: the model file.
        alias: the model name in replies.
        context: tokens of prompt and reply together, for each request; longer requests get an HTTP 400.
        parallel: requests served at once.
        threads: CPU threads; None leaves the choice to llama.cpp.
        on_gpu: whether its layers go to a GPU; None leaves the choice to llama.cpp.
        longest_reply: tokens of a reply whose request names no limit; None lets it fill the context.
        temperature: of a request that names none; None leaves llama.cpp's.
        chat_template: in Jinja's language; None is the file's own.
        address: None is a free port of 127.0.0.1 with a key that nobody else knows.

    Raises:
        Refusal: on entering, when the file is missing, llama.cpp cannot load it, or has no GPU where one is asked for.
    """

    def __init__(
        self,
        gguf: Path | str,
        *,
        alias: str = "local",
        context: int = 8192,
        parallel: int = 1,
        threads: int | None = None,
        on_gpu: bool | None = None,
        longest_reply: int | None = None,
        temperature: float | None = None,
        chat_template: str | None = None,
        address: Address | None = None,
    ) -> None:
        self.gguf = Path(gguf)
        address = address or Address("127.0.0.1", 0, secrets.token_urlsafe(24))
        self.api_key = address.api_key
        self.base_url = ""
        self.build: dict[str, Any] = {}
        self._settings = {
            "path": str(self.gguf),
            "alias": alias,
            "context": context,
            "parallel": parallel,
            "threads": threads,
            "on_gpu": on_gpu,
            "longest_reply": longest_reply,
            "temperature": temperature,
            "chat_template": chat_template,
            "host": address.host,
            "port": address.port,
        }
        self._child: subprocess.Popen[bytes] | None = None
        self._oom_kills = oom_kills()
        self._errors: IO[bytes] | None = None

    def __repr__(self) -> str:
        return f"LocalServer({self.gguf.name!r}, base_url={self.base_url!r})"

    def __enter__(self) -> LocalServer:
        if not self.gguf.is_file():
            raise Refusal(f"there is no model file {self.gguf}")
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._errors = tempfile.TemporaryFile()
        self._child = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": path},
            # Out of the terminal's group: Ctrl-C must not cut off requests that are still to be answered.
            start_new_session=True,
        )
        try:
            self.build = self._start(self._child)
            if self._settings["on_gpu"] and not self.build["gpus"]:
                hint = "use gpu=cpu, or install an xllamacpp built for yours"
                raise Refusal(f"this build of llama.cpp has no GPU: {hint}")
        except BaseException:
            self.stop()
            raise
        self.base_url = f"{self.build.pop('address')}/v1"
        count_process(self._child.pid)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs, for meters that want to count it."""
        return self._child.pid if self._child else None

    def ending(self) -> Exception | None:
        """Why the server ended without being asked to, or None while it runs."""
        child = self._child
        if child is None:
            return RuntimeError("llama.cpp's server was stopped")
        try:
            code = child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            return None
        if code == -signal.SIGKILL and oom_kills() > self._oom_kills:
            return MemoryError("llama.cpp's server was killed by the kernel's out-of-memory killer")
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return RuntimeError(f"llama.cpp's server ended with {how}: {self._last_error()}")

    def stop(self) -> None:
        """End the server; calling it twice is harmless."""
        child, self._child = self._child, None
        if child is not None:
            assert child.stdin
            assert child.stdout
            process_ends(child.pid)
            child.terminate()
            try:
                child.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            child.stdin.close()
            child.stdout.close()
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def _start(self, child: subprocess.Popen[bytes]) -> dict[str, Any]:
        assert child.stdin
        assert child.stdout
        # Through the pipe, because other users of the machine can read a command line.
        settings = {**self._settings, "api_key": self.api_key}
        try:
            child.stdin.write(json.dumps(settings).encode() + b"\n")
            child.stdin.flush()
        except BrokenPipeError:
            pass  # It died while starting; the reading below finds out and says why.
        ready, _, _ = select.select([child.stdout], [], [], _START_S)
        said = json.loads(child.stdout.readline() or b"{}") if ready else {}
        if "address" not in said:
            raise Refusal(f"llama.cpp cannot serve {self.gguf}: {said.get('error') or self._last_error()}")
        return said

    def _last_error(self) -> str:
        assert self._errors
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no reason given"


def _serve() -> None:
    """The child: read settings from stdin, serve until stdin ends, say the address on stdout."""
    settings: dict[str, Any] = json.loads(sys.stdin.readline())
    # llama.cpp may print; only our line may reach the parent.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = settings["path"]
        params.model_alias = {settings["alias"]}
        params.hostnames = [settings["host"]]
        params.port = settings["port"]
        params.api_keys = [settings["api_key"]] if settings["api_key"] else []
        params.n_parallel = settings["parallel"]
        params.n_ctx = settings["context"] * settings["parallel"]  # llama.cpp shares it out among the slots
        params.ui = False
        params.warmup = False
        params.verbosity = 0  # errors only
        params.cache_ram_mib = 0  # no prompts of earlier requests, which would count as memory of this one
        if settings["longest_reply"] is not None:
            params.n_predict = settings["longest_reply"]
        if settings["temperature"] is not None:
            params.sampling.temp = settings["temperature"]
        if settings["chat_template"] is not None:
            params.chat_template = settings["chat_template"]
        if settings["on_gpu"] is not None:
            params.n_gpu_layers = -1 if settings["on_gpu"] else 0
        if settings["threads"]:
            params.cpuparams.n_threads = settings["threads"]
            params.cpuparams_batch.n_threads = settings["threads"]
        server = xllamacpp.Server(params)
        said = {
            "address": server.listening_address,
            "threads": params.cpuparams.n_threads,
            "system": xllamacpp.get_system_info().strip(" |"),
            "gpus": [device["description"] for device in xllamacpp.get_device_info() if "GPU" in str(device["type"])],
        }
    except Exception as error:
        said = {"error": str(error)}
    print(json.dumps(said), file=answer, flush=True)
    if "address" in said:
        sys.stdin.read()
    # Not sys.exit: the server's destructor waits for requests that nobody will read any more.
    os._exit(0)


if __name__ == "__main__":
    _serve()
