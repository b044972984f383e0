"""Ollama's Modelfile beside a ``.gguf`` file that was written here: ``ollama create NAME -f Modelfile``.

Instructions and parameters are those of Ollama's ``docs/modelfile.md``, the template's language that of
``docs/template.md``. Ollama does not run a file's own Jinja template everywhere: it looks for one of its own that is
nearly the same text (``template.Named`` in ``template/template.go``), and without one sends the bare prompt. So the
template is written out wherever it is known to say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAME = "Modelfile"
CHATML_START, CHATML_END = "<|im_start|>", "<|im_end|>"
# ChatML in Go's template language. A ``range`` over messages is what makes Ollama hand over all turns at once.
CHATML = (
    "{{- range .Messages }}" + CHATML_START + "{{ .Role }}\n{{ .Content }}" + CHATML_END + "\n{{ end }}"
    "" + CHATML_START + "assistant\n"
)
# Room for keys and values is taken when the model starts, so a long context is not asked for by itself.
LARGEST_CONTEXT = 8192
_QUOTES = '"""'
Message = dict[str, str]
_USER: Message = {"role": "user", "content": " Is 1 < 2?\n\nYes & no. "}
_EXAMPLES: tuple[tuple[Message, ...], ...] = (
    (_USER,),
    (_USER, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "{{ .Why }}?"}),
    ({"role": "system", "content": "Be brief.\n"}, _USER),
    ({"role": "system", "content": "Be brief."}, _USER, {"role": "assistant", "content": ""}, _USER),
)


def write(gguf: Path, tokenizer: Any, context: int) -> Path:
    """Write a Modelfile beside a model file, and return its path.

    Args:
        gguf: the model file, which the Modelfile names relative to itself.
        tokenizer: a transformers tokenizer, with the chat template that the file holds.
        context: how many tokens the model was made for.
    """
    path = gguf.with_name(NAME)
    path.write_text(content(gguf.name, tokenizer, context), encoding="utf-8")
    return path


def content(file: str, tokenizer: Any, context: int) -> str:
    """The Modelfile's text."""
    lines = ["# ollama create NAME -f Modelfile && ollama run NAME", f"FROM ./{file}"]
    system = chatml_system(tokenizer)
    if system is None:
        lines += [
            "# TEMPLATE is left out: this model's chat template was not shown to say the same in Ollama's language.",
            "# Ollama then looks the file's tokenizer.chat_template up among those it knows, and without a match sends",
            "# the prompt alone: see `ollama show NAME --template`.",
        ]
    else:
        lines.append(f"TEMPLATE {_QUOTES}{CHATML}{_QUOTES}")
        if system:
            lines += [
                "# What the chat template itself says where a conversation names no other.",
                f"SYSTEM {_QUOTES}{system}{_QUOTES}",
            ]
    stops = [mark for mark in _stops(tokenizer, system is not None) if '"' not in mark and "\n" not in mark]
    lines += [f'PARAMETER stop "{mark}"' for mark in stops]
    if context > LARGEST_CONTEXT:
        lines.append(f"# The model takes up to {context} tokens; each costs memory.")
    lines.append(f"PARAMETER num_ctx {min(context, LARGEST_CONTEXT)}")
    return "\n".join(lines) + "\n"


def chatml_system(tokenizer: Any) -> str | None:
    """The system prompt that a ChatML template adds by itself ("" for none), or None where it is not ChatML.

    The tokenizer's template is held against ChatML on conversations with and without a system prompt, with several
    turns, an empty one, and text that a template could mistake for its own.
    """
    if tokenizer.chat_template is None:
        return None
    added = _added(tokenizer)
    if added is None or _QUOTES in added:
        return None
    for example in _EXAMPLES:
        expected = chatml(_with_system(example, added))
        if _rendered(tokenizer, example) != expected:
            return None
    return added


def chatml(messages: Sequence[Message]) -> str:
    """What :data:`CHATML` makes of a conversation, up to where the assistant is to speak."""
    turns = [f"{CHATML_START}{turn['role']}\n{turn['content']}{CHATML_END}\n" for turn in messages]
    return "".join(turns) + f"{CHATML_START}assistant\n"


def _added(tokenizer: Any) -> str | None:
    """What stands as a system prompt in a conversation that has none; None where the text is not even alike."""
    text, head = _rendered(tokenizer, (_USER,)), f"{CHATML_START}system\n"
    if text is None:
        return None
    if not text.startswith(head):
        return ""
    found, end, _ = text[len(head) :].partition(f"{CHATML_END}\n")
    return found if end else None


def _with_system(messages: Sequence[Message], system: str) -> list[Message]:
    """As Ollama puts a Modelfile's SYSTEM before a conversation that begins without one (``server/routes.go``)."""
    own = [{"role": "system", "content": system}] if system and messages[0]["role"] != "system" else []
    return [*own, *messages]


def _rendered(tokenizer: Any, messages: Sequence[Message]) -> str | None:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError):
        return None  # a template that knows no system prompt, say


def _stops(tokenizer: Any, is_chatml: bool) -> list[str]:
    """The marks that end an answer, each once."""
    found = [CHATML_END] if is_chatml else []
    return list(dict.fromkeys([*found, *([tokenizer.eos_token] if tokenizer.eos_token else [])]))
