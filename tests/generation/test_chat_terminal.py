"""The terminal conversation, with the real engine on the tiny model."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from typing import Any

import pytest
import torch

from llm_at_home.generation.chat import WELCOME, Chat
from llm_at_home.generation.eager import EagerEngine
from llm_at_home.models.chat import prompt_ids


@pytest.fixture
def engine(model: Any, tokenizer: Any) -> EagerEngine:
    return EagerEngine(model, tokenizer, max_new_tokens=6, temperature=0.0)


def talk(engine: EagerEngine, text: str, **options: Any) -> tuple[Chat, str]:
    out = io.StringIO()
    chat = Chat(engine, lines=io.StringIO(text), out=out, **options)
    chat.run()
    return chat, out.getvalue()


def roles(chat: Chat) -> list[str]:
    return [message["role"] for message in chat.messages]


def test_a_conversation_keeps_its_turns_and_prints_each_answer(engine) -> None:
    chat, out = talk(engine, "Hello\n\nAnd you?\n/exit\nnever read\n")
    assert roles(chat) == ["user", "assistant"] * 2
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == ["Hello", "And you?"]
    assert out.startswith(WELCOME)
    for message in chat.messages[1::2]:
        assert message["content"] in out
    assert "never read" not in out


def test_the_second_question_is_asked_in_the_light_of_the_first(engine, monkeypatch) -> None:
    prompts = []
    reply = engine.reply
    monkeypatch.setattr(engine, "reply", lambda prompt, *a, **k: (prompts.append(prompt), reply(prompt, *a, **k))[1])
    chat, _ = talk(engine, "Hello\nAgain\n/reset\nHello\n")
    first, second, third = (engine.tokenizer.decode(prompt) for prompt in prompts)
    assert "Hello" in second
    assert "Again" in second
    assert (
        chat.messages[1]["content"]
        == engine.tokenizer.decode(engine.reply(prompts[2], sampling(engine)).tokens, skip_special_tokens=True).strip()
    )
    assert third == first


def sampling(engine: EagerEngine) -> Any:
    from llm_at_home.generation.reply import Sampling

    return Sampling(engine.max_new_tokens)


def test_reset_forgets_and_an_unknown_command_is_named_and_not_answered(engine) -> None:
    chat, out = talk(engine, "Hello\n/reset\n/quit\n")
    assert chat.messages == []
    assert "(a new conversation)" in out
    assert "/quit is no command: /reset, /adapter or /exit" in out


@pytest.mark.parametrize("text", ["", "/exit\n", "  /exit  \n", "\n\n"])
def test_exit_and_the_end_of_the_input_leave(engine, text: str) -> None:
    chat, _ = talk(engine, text)
    assert chat.messages == []


def test_a_last_line_without_its_end_is_answered(engine) -> None:
    chat, _ = talk(engine, "Hello")
    assert roles(chat) == ["user", "assistant"]


def test_answers_vary_by_seed_and_repeat_with_it(model, tokenizer) -> None:
    warm = EagerEngine(model, tokenizer, max_new_tokens=8)

    def answers(seed: int) -> list[str]:
        chat, _ = talk(warm, "Hello\n/reset\nHello\n", seed=seed)
        return [m["content"] for m in chat.messages]

    assert answers(1) == answers(1)
    assert answers(1) != answers(2)


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(model, tokenizer) -> None:
    endless = EagerEngine(model, tokenizer, max_new_tokens=1500, temperature=0.0)
    started = threading.Event()

    class Out(io.StringIO):
        def write(self, text: str) -> int:
            if text.strip() not in ("", ">") and text.strip() != WELCOME:
                started.set()
            return super().write(text)

    out = Out()

    def press() -> None:
        started.wait(30)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=press)
    thread.start()
    chat = Chat(endless, lines=io.StringIO("Tell me a long story\n/exit\n"), out=out)
    chat.run()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
    assert out.getvalue().count("(stopped)") == 1
    assert roles(chat) == ["user", "assistant"]
    partial = chat.messages[1]["content"]
    assert 0 < len(tokenizer(partial)["input_ids"]) < 1400
    # The same conversation goes on: the next answer is a whole one.
    endless.max_new_tokens = 5
    chat.lines = io.StringIO("Hello\n")
    chat.run()
    assert roles(chat) == ["user", "assistant"] * 2
    assert chat.messages[1]["content"] == partial
    assert out.getvalue().count("(stopped)") == 1


def test_ctrl_c_within_one_run_stops_one_answer_only(engine) -> None:
    """The signal arrives during the first answer of two."""
    out = io.StringIO()
    chat = Chat(engine, lines=io.StringIO("One\nTwo\n"), out=out)
    say, said = chat._say, []

    def press_once(text: str) -> None:
        say(text)
        if len(chat.messages) == 1 and not said:
            said.append(text)
            os.kill(os.getpid(), signal.SIGINT)

    chat._say = press_once
    chat.run()
    assert roles(chat) == ["user", "assistant"] * 2
    assert out.getvalue().count("(stopped)") == 1
    assert len(chat.messages[3]["content"]) > 0


def test_ctrl_c_at_the_prompt_stops_nothing(engine) -> None:
    class Pressed(io.StringIO):
        def readline(self, *arguments: Any) -> str:
            os.kill(os.getpid(), signal.SIGINT)
            return super().readline(*arguments)

    out = io.StringIO()
    chat = Chat(engine, lines=Pressed("Hello\n"), out=out)
    chat.run()
    assert roles(chat) == ["user", "assistant"]
    assert "(stopped)" not in out.getvalue()


def test_the_former_handler_is_restored_when_the_engine_fails(engine, monkeypatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "reply", fail)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError):
        talk(engine, "Hello\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_line_that_the_context_cannot_hold_is_forgotten_and_the_conversation_goes_on(engine, monkeypatch) -> None:
    prompt = len(prompt_ids(engine.tokenizer, [{"role": "user", "content": "Hello"}]))
    monkeypatch.setattr(type(engine), "context", prompt + 3)
    chat, out = talk(engine, "long " * 200 + "\nHello\nAnd you?\n")
    assert [m["content"] for m in chat.messages[::2]] == ["Hello"]
    assert out.count(f"tokens and the model knows {prompt + 3}: /reset)") == 2
    assert len(engine.reply(prompt_ids(engine.tokenizer, chat.messages[:1]), sampling(engine)).tokens) == 6
    assert 1 <= len(engine.tokenizer(chat.messages[1]["content"])["input_ids"]) <= 3


def test_a_real_terminal_is_read_by_input_and_control_d_leaves(engine, monkeypatch) -> None:
    lines = iter(["Hello  ", "", EOFError()])

    def read(prompt: str = "") -> str:
        line = next(lines)
        if isinstance(line, EOFError):
            raise line
        return line

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    chat = Chat(engine, lines=sys.stdin, out=io.StringIO())
    chat.run()
    assert roles(chat) == ["user", "assistant"]
    assert chat.messages[0]["content"] == "Hello"


def test_adapters_are_switched_in_the_conversation(tiny_model, tokenizer, tmp_path) -> None:
    """Each adapter, and the base, answers a line in turn."""
    from transformers import AutoModelForCausalLM

    from llm_at_home.adapters.attach import add_saved, attach_saved, prepare_for_training

    def base():
        return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    lora = {"name": "lora", "trains": "adapter", "_target_": "peft.LoraConfig", "task_type": "CAUSAL_LM"}
    lora |= {"r": 4, "lora_alpha": 64, "target_modules": "all-linear", "init_lora_weights": False}
    for seed in (1, 2):
        torch.manual_seed(seed)
        prepare_for_training(base(), lora).save_pretrained(tmp_path / str(seed))
    model = attach_saved(base(), tmp_path / "1")
    add_saved(model, tmp_path / "2", "two")
    engine = EagerEngine(model, tokenizer, max_new_tokens=8, temperature=0.0)
    assert engine.adapters == ["default", "two"]
    lines = "".join(f"/adapter {name}\n/reset\nHello\n" for name in ("two", "none", "default"))
    answers = []

    class Kept(Chat):
        def _answer(self, line: str) -> None:
            super()._answer(line)
            answers.append(self.messages[-1]["content"])

    out = io.StringIO()
    Kept(engine, lines=io.StringIO(f"Hello\n{lines}/adapter three\n"), out=out).run()
    assert answers[0] == answers[3]
    assert len(set(answers[:3])) == 3
    alone, _ = talk(EagerEngine(base(), tokenizer, max_new_tokens=8, temperature=0.0), "Hello\n")
    assert answers[2] == alone.messages[-1]["content"]
    assert "/adapter NAME: default, two, none" in out.getvalue()


def test_an_engine_without_adapters_says_so(engine) -> None:
    _, out = talk(engine, "/adapter none\n")
    assert "this engine has none" in out
