"""Chat templates: rendering conversations to token ids, and which of those tokens the loss covers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm_at_home.errors import Refusal

log = logging.getLogger(__name__)

# Named defaults for base models, whose tokenizers bring no template. Jinja, as transformers reads it.
TEMPLATES = {
    # The format of openassistant-guanaco, the paper's data set.
    "guanaco": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Human: ' + message['content'] + '\n' }}"
        "{% else %}{{ '### Assistant: ' + message['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
        # No blank at the end: the model was taught it as part of the answer's first token.
        "{% if add_generation_prompt %}{{ '### Assistant:' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}

IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Encoded:
    """One conversation as token ids. ``labels`` equals ``input_ids`` on assistant tokens and is -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool

    @property
    def trained_tokens(self) -> int:
        """How many tokens the loss covers; the first token of a sequence is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


def ensure_chat_template(tokenizer: Any, chosen: str | None, name: str) -> None:
    """Set the named template where one is chosen.

    Raises:
        Refusal: for an unknown name, or where the tokenizer brings none and none is chosen.
    """
    template = template_named(chosen)
    if template is not None:
        tokenizer.chat_template = template
    elif tokenizer.chat_template is None:
        raise Refusal(f"{name} has no chat template: choose one with model.chat_template=guanaco or chatml")


def template_named(chosen: str | None) -> str | None:
    """The template that ``model.chat_template`` names, in Jinja's language; None for the model's own.

    Raises:
        Refusal: for an unknown name.
    """
    if chosen is None:
        return None
    if chosen not in TEMPLATES:
        raise Refusal(f"model.chat_template={chosen} is unknown: choose one of {', '.join(TEMPLATES)}, or null")
    return TEMPLATES[chosen]


def render(tokenizer: Any, messages: Sequence[dict[str, str]], generation_prompt: bool = False) -> str:
    """The conversation as the text that the model sees."""
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt)


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token by which the chat template ends an assistant's turn; None where it ends in no such token.

    It is what a model fine-tuned with the template says last, also one whose own end-of-sequence token is another: a
    base model of Qwen's, say, ends with ``<|endoftext|>`` and its template's turns with ``<|im_end|>``.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    said = "An answer"
    messages = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": said}]
    try:
        after = render(tokenizer, messages).rpartition(said)[2].lstrip()
    except Exception:  # a template refuses conversations in words of its own, and an engine need not have one
        return None
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
    return ids[0] if added is not None and added.special else None


def prompt_ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a conversation up to the point where the assistant is to speak."""
    return tokenizer(render(tokenizer, messages, generation_prompt=True), add_special_tokens=False)["input_ids"]


def encode(tokenizer: Any, messages: Sequence[dict[str, str]], max_length: int) -> Encoded:
    """Token ids of a whole conversation and the labels of its assistant tokens.

    The spans of the assistant are found by rendering prefixes: what the template adds after its generation prompt,
    up to and with its end-of-turn mark, belongs to the assistant. A template without generation marks therefore gives
    the right mask too. Longer conversations are cut at ``max_length`` tokens.

    Raises:
        Refusal: for a template whose text of a prefix is no prefix of the whole text.
    """
    text = render(tokenizer, messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start = render(tokenizer, messages[:i], generation_prompt=True)
            end = render(tokenizer, messages[: i + 1])
            if not text.startswith(start) or not text.startswith(end.rstrip("\n")):
                hint = "choose another with model.chat_template=chatml or guanaco"
                raise Refusal(f"this model's chat template changes earlier turns, which training cannot use: {hint}")
            # The template's newline after the end-of-turn mark is not the model's to say.
            spans.append((len(start), len(end.rstrip("\n"))))
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoding["input_ids"]
    inside = [
        any(first < end and last > start for start, end in spans) and last > first
        for first, last in encoding["offset_mapping"]
    ]
    labels = [token if chosen else IGNORED for token, chosen in zip(ids, inside, strict=True)]
    return Encoded(ids[:max_length], labels[:max_length], truncated=len(ids) > max_length)
