"""A conversation in the terminal: /reset forgets it, /adapter switches, /exit ends it, Ctrl-C stops an answer."""

from __future__ import annotations

import math
import signal
import sys
from typing import Any, TextIO

from llm_at_home.generation.reply import OTHER_TEMPERATURE, Sampling
from llm_at_home.models.chat import prompt_ids

WELCOME = "Type a message. /reset starts anew, /exit leaves, Ctrl-C stops an answer."
NO_ADAPTER = "none"


class Chat:
    """One conversation with an engine.

    Args:
        engine: an engine with ``reply(prompt, sampling, on_text, should_stop)`` and a tokenizer.
        seed: of the first answer; each further answer uses the next.
        lines: where the user's lines come from.
        out: where answers go.
    """

    def __init__(self, engine: Any, seed: int = 0, lines: TextIO = sys.stdin, out: TextIO = sys.stdout) -> None:
        self.engine = engine
        self.seed = seed
        self.lines = lines
        self.out = out
        self.messages: list[dict[str, str]] = []
        self._stop = False

    def run(self) -> None:
        """Read lines and answer them until /exit or the end of the input."""
        previous = signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            self._say(WELCOME + "\n")
            while (line := self._next_line()) is not None:
                if line == "/exit":
                    break
                if line == "/reset":
                    self.messages = []
                    self._say("(a new conversation)\n")
                elif line.split()[:1] == ["/adapter"]:
                    self._switch(line.removeprefix("/adapter").strip())
                elif line.startswith("/"):
                    self._say(f"{line} is no command: /reset, /adapter or /exit\n")
                elif line:
                    self._answer(line)
        finally:
            signal.signal(signal.SIGINT, previous)

    def _next_line(self) -> str | None:
        self._say("> ")
        try:
            line = input() if self.lines is sys.stdin and sys.stdin.isatty() else self.lines.readline()
        except EOFError:
            return None
        if self.lines is sys.stdin and sys.stdin.isatty():
            return line.strip()
        return line.strip() if line else None

    def _answer(self, line: str) -> None:
        self._stop = False
        self.messages.append({"role": "user", "content": line})
        temperature = self.engine.temperature if self.engine.temperature is not None else OTHER_TEMPERATURE
        prompt = prompt_ids(self.engine.tokenizer, self.messages)
        room = (self.engine.context or math.inf) - len(prompt)
        if room < 1:
            self.messages.pop()
            self._say(
                f"(the conversation has {len(prompt)} tokens and the model knows {self.engine.context}: /reset)\n"
            )
            return
        sampling = Sampling(int(min(self.engine.max_new_tokens, room)), temperature, self.seed)
        self.seed += 1
        reply = self.engine.reply(prompt, sampling, on_text=self._say, should_stop=lambda: self._stop)
        self._say("\n" if reply.finish_reason != "stopped" else " (stopped)\n")
        self.messages.append({"role": "assistant", "content": reply.text})

    def _switch(self, name: str) -> None:
        """Answer with another adapter from now on, or with none; the conversation goes on."""
        names = getattr(self.engine, "adapters", [])
        if name not in (*names, NO_ADAPTER) or not names:
            known = ", ".join([*names, NO_ADAPTER]) if names else "this engine has none"
            self._say(f"/adapter NAME: {known}\n")
            return
        try:
            self.engine.use_adapter(None if name == NO_ADAPTER else name)
        except ValueError as error:
            self._say(f"({error})\n")
        else:
            self._say(f"(adapter: {name})\n")

    def _on_interrupt(self, number: int, frame: Any) -> None:
        self._stop = True

    def _say(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()
