from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from llm_at_home.errors import Refusal
from llm_at_home.models.chat import IGNORED, TEMPLATES, Encoded, encode, ensure_chat_template, prompt_ids, render


def conversation(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + turns


CONVERSATIONS = {
    "one turn": conversation("Hi", "Hello there."),
    "two turns": conversation("Hi", "Hello there.", "And you?", "I am well, thanks."),
    "three turns and a system": conversation("a", "b", "c", "d", "e", "f", system="Be short."),
    "other scripts": conversation("Größe?", "Übergröße – 12 µm, 日本語 😀👩‍👩‍👧!", "¿Y?", "Ça va 🚀"),
    "blanks and lines": conversation("code", "def f():\n    return 1\n\n\nprint(f())", "more", "- a\n- b\n"),
    "answers that repeat": conversation("yes", "yes", "yes", "yes"),
    "the answer is in the question": conversation("Say: Hello there.", "Hello there."),
    "the last word is the user's": conversation("Hi", "Hello there.", "And?"),
}

MARKED = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def original(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(params=["its own", *TEMPLATES])
def tokenizer(request: pytest.FixtureRequest, original: Any) -> Any:
    chosen = copy.deepcopy(original)
    ensure_chat_template(chosen, None if request.param == "its own" else request.param, "tiny")
    return chosen


@pytest.fixture(params=list(CONVERSATIONS))
def messages(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    return CONVERSATIONS[request.param]


def spans(labels: list[int]) -> list[list[int]]:
    """The runs of trained tokens."""
    found: list[list[int]] = []
    for before, label in zip([IGNORED, *labels], labels, strict=False):
        if label != IGNORED:
            if before == IGNORED:
                found.append([])
            found[-1].append(label)
    return found


def test_the_loss_covers_the_assistants_texts_with_their_end_mark_and_nothing_else(tokenizer, messages) -> None:
    encoded = encode(tokenizer, messages, 10_000)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    # guanaco writes a blank before the answer, which is one token with its first word
    blank = " " if "### Assistant" in tokenizer.chat_template else ""
    assert [tokenizer.decode(span) for span in spans(encoded.labels)] == [
        f"{blank}{answer}{tokenizer.eos_token}" for answer in answers
    ]
    assert all(label in (IGNORED, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    assert not encoded.truncated
    assert encoded.trained_tokens == sum(map(len, spans(encoded.labels)))


def test_ids_are_those_of_apply_chat_template(tokenizer, messages) -> None:
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert encode(tokenizer, messages, 10_000).input_ids == expected
    asked = [m for m in messages if m["role"] != "assistant"][:1]
    expected = tokenizer.apply_chat_template(asked, tokenize=True, add_generation_prompt=True, return_dict=True)
    assert prompt_ids(tokenizer, asked) == expected["input_ids"]


def test_what_is_asked_at_inference_is_what_was_seen_in_training(tokenizer, messages) -> None:
    """Token for token: a generation prompt that ends otherwise than the training text would ask another question."""
    encoded = encode(tokenizer, messages, 10_000)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = prompt_ids(tokenizer, messages[:i])
            assert encoded.input_ids[: len(prompt)] == prompt
            assert encoded.labels[len(prompt) - 1] == IGNORED
            assert encoded.labels[len(prompt)] != IGNORED


def test_the_mask_is_that_of_a_template_with_generation_marks(original, messages) -> None:
    marked = copy.deepcopy(original)
    marked.chat_template = MARKED
    assert render(marked, messages) == render(original, messages)
    theirs = marked.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    encoded = encode(original, messages, 10_000)
    assert encoded.input_ids == theirs["input_ids"]
    mask = theirs.get("assistant_masks", theirs.get("assistant_tokens_mask"))
    assert [label != IGNORED for label in encoded.labels] == [bool(m) for m in mask]
    assert any(mask)


def test_a_conversation_that_is_too_long_is_cut_and_says_so(tokenizer) -> None:
    messages = CONVERSATIONS["two turns"]
    whole = encode(tokenizer, messages, 10_000)
    n = len(whole.input_ids)
    exact, cut = encode(tokenizer, messages, n), encode(tokenizer, messages, n - 4)
    assert not exact.truncated
    assert cut.truncated
    assert (cut.input_ids, cut.labels) == (whole.input_ids[: n - 4], whole.labels[: n - 4])
    assert 0 < cut.trained_tokens < whole.trained_tokens
    assert encode(tokenizer, messages, 3).trained_tokens == 0


def test_a_first_token_is_never_predicted() -> None:
    assert Encoded([1, 2, 3], [1, 2, 3], truncated=False).trained_tokens == 2
    assert Encoded([1, 2, 3], [IGNORED, 2, 3], truncated=False).trained_tokens == 2


def test_guanacos_format(original) -> None:
    chosen = copy.deepcopy(original)
    ensure_chat_template(chosen, "guanaco", "tiny")
    text = render(chosen, CONVERSATIONS["two turns"])
    bos, eos = chosen.bos_token, chosen.eos_token
    assert text == (
        f"{bos}### Human: Hi\n### Assistant: Hello there.{eos}\n"
        f"### Human: And you?\n### Assistant: I am well, thanks.{eos}\n"
    )
    assert render(chosen, conversation("Hi"), generation_prompt=True) == f"{bos}### Human: Hi\n### Assistant:"


def test_chatml_format(original) -> None:
    chosen = copy.deepcopy(original)
    ensure_chat_template(chosen, "chatml", "tiny")
    assert render(chosen, conversation("Hi", system="S"), generation_prompt=True) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_tokenizers_own_template_stays_unless_one_is_chosen(original) -> None:
    own = copy.deepcopy(original)
    ensure_chat_template(own, None, "tiny")
    assert own.chat_template == original.chat_template
    ensure_chat_template(own, "chatml", "tiny")
    assert own.chat_template == TEMPLATES["chatml"]


def test_a_missing_or_unknown_template_is_refused_with_the_choices(original) -> None:
    bare = copy.deepcopy(original)
    bare.chat_template = None
    with pytest.raises(Refusal, match=r"base-7b has no chat template: choose one with model.chat_template=guanaco"):
        ensure_chat_template(bare, None, "base-7b")
    with pytest.raises(Refusal, match=r"model.chat_template=alpaca is unknown: choose one of guanaco, chatml"):
        ensure_chat_template(bare, "alpaca", "base-7b")
    assert bare.chat_template is None
    ensure_chat_template(bare, "guanaco", "base-7b")
    assert bare.chat_template == TEMPLATES["guanaco"]


def test_a_template_that_rewrites_earlier_turns_is_not_guessed_at(original) -> None:
    changing = copy.deepcopy(original)
    changing.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' }}"
        "{{ message['content'] if loop.last else message['content'][:2] }}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    with pytest.raises(Refusal, match="changes earlier turns"):
        encode(changing, CONVERSATIONS["two turns"], 100)
