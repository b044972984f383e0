from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_at_home.evaluation.perplexity import conversation_perplexity


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SHORT = [turn("user", "Hi"), turn("assistant", "Hello, how can I help?")]
LONG = [
    turn("user", "Name a colour."),
    turn("assistant", "Red."),
    turn("user", "And one more, with a reason?"),
    turn("assistant", "Blue, because the sky is blue on a clear day and people like it."),
]
UNANSWERED = [turn("user", "Is anybody there?")]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def by_hand(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> list[float]:
    """Negative log-likelihoods of the assistant's tokens; the text is put together here, without the template."""
    ids, trained = [], []

    def add(text: str, is_trained: bool) -> None:
        new = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.extend(new)
        trained.extend([is_trained] * len(new))

    add("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n", False)
    for message in messages:
        add(f"<|im_start|>{message['role']}\n", False)
        add(f"{message['content']}<|im_end|>", message["role"] == "assistant")
        add("\n", False)
    losses = []
    for position in range(1, len(ids)):
        if trained[position]:
            with torch.inference_mode():
                logits = model(torch.tensor([ids[:position]])).logits[0, -1].double()
            losses.append(-float(torch.log_softmax(logits, -1)[ids[position]]))
    return losses


def test_it_is_exp_of_the_mean_nll_over_all_assistant_tokens(model, tokenizer) -> None:
    losses = [by_hand(model, tokenizer, messages) for messages in (SHORT, LONG)]
    assert len(losses[0]) != len(losses[1])
    every = losses[0] + losses[1]
    reading = conversation_perplexity(model, tokenizer, [SHORT, LONG])
    assert reading.value == pytest.approx(math.exp(sum(every) / len(every)), rel=1e-4)
    assert (reading.n, reading.method, reading.unit) == (2, "assistant_tokens", "1")
    low, high = reading.interval95
    assert low <= reading.value <= high
    ends = sorted(math.exp(sum(part) / len(part)) for part in losses)
    assert (low, high) == pytest.approx(ends, rel=1e-4)  # of two items, a quarter of the draws takes one twice


def test_what_is_cut_off_is_not_scored(model, tokenizer) -> None:
    losses = by_hand(model, tokenizer, SHORT)
    length = len(tokenizer(tokenizer.apply_chat_template(SHORT, tokenize=False))["input_ids"])
    reading = conversation_perplexity(model, tokenizer, [SHORT], max_length=length - 3)  # less end mark, newline, "?"
    assert reading.value == pytest.approx(math.exp(sum(losses[:-2]) / (len(losses) - 2)), rel=1e-4)


def test_without_an_answer_it_is_unknown(model, tokenizer) -> None:
    for conversations in ([], [UNANSWERED], [UNANSWERED, UNANSWERED]):
        reading = conversation_perplexity(model, tokenizer, conversations)
        assert reading.value is None
        assert "no conversation has an assistant's answer" in reading.reason


def test_unanswered_conversations_among_others_change_nothing(model, tokenizer) -> None:
    alone = conversation_perplexity(model, tokenizer, [SHORT, LONG])
    mixed = conversation_perplexity(model, tokenizer, [UNANSWERED, SHORT, UNANSWERED, LONG, UNANSWERED])
    assert mixed == alone


def test_a_broken_model_is_unknown_with_the_reason(tiny_model, tokenizer) -> None:
    from transformers import AutoModelForCausalLM

    broken = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.inf)
    reading = conversation_perplexity(broken, tokenizer, [SHORT])
    assert reading.value is None
    assert "not finite" in reading.reason


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_behind_a_trained_prompt_the_same_tokens_are_scored(model, tokenizer, kind) -> None:
    """PEFT puts trained prompts before the tokens; where they are embeddings, they have logits too."""
    import copy

    import peft

    from llm_at_home.models.chat import encode

    torch.manual_seed(0)
    prompted = peft.get_peft_model(
        copy.deepcopy(model), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5)
    )
    prompted.eval()
    messages = [turn("user", "How high is it?"), turn("assistant", "As high as a house.")]
    encoded = encode(tokenizer, messages, 2048)
    with torch.no_grad():
        loss = prompted(input_ids=torch.tensor([encoded.input_ids]), labels=torch.tensor([encoded.labels])).loss
    alone = conversation_perplexity(model, tokenizer, [messages]).value
    reading = conversation_perplexity(prompted, tokenizer, [messages])
    assert reading.value == pytest.approx(math.exp(loss), rel=1e-4)
    assert reading.value != pytest.approx(alone, rel=1e-3)
