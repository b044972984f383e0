"""Ratings as an expected value over the scale, from llama.cpp's probabilities instead of one chosen token.

A small model's most likely rating is nearly always the same one; its mean over the ten possible ratings still moves
with the answer (G-Eval, Liu et al. 2023, weighs ratings by their probabilities likewise).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llm_at_home.evaluation.judge.client import JudgeClient, JudgeRejected, Reply

#: What stands before the rating in the published format.
PREFIX = "Rating: [["
#: Tokens of the distribution that are asked for; the digits must be among them to count.
TOP = 200


def rate(client: JudgeClient, messages: Sequence[Mapping[str, str]], extra_body: Mapping[str, Any]) -> Reply:
    """The expected rating of one conversation, as the reply ``Rating: [[6.37]]`` with its ten probabilities.

    The reply is begun with :data:`PREFIX` and the next token's distribution read. "10" may be one token or two: then
    P(10) = P(1) P(0|1), and P(1) is what is left of it. The ten are renormalised to sum to one.

    Raises:
        JudgeRejected: when the server has no such endpoint, or no rating is among the :data:`TOP` tokens.
        JudgeError: as :meth:`JudgeClient.ask`.
    """
    prompt = str(client.post("/apply-template", {"messages": list(messages)}).get("prompt") or "")
    if not prompt:
        raise JudgeRejected("the server renders no chat template: judge.rating=expected needs llama.cpp's server")
    first = _distribution(client, prompt + PREFIX, extra_body)
    # The one prefix that is reused: that of the very request before, so that the prompt is read once.
    reused = {**extra_body, "cache_prompt": True}
    after_one = _distribution(client, prompt + PREFIX + "1", reused) if first.get("1") else {}
    weights = ratings(first, after_one)
    total = math.fsum(weights)
    if total <= 0:
        raise JudgeRejected(f"no rating is among the {TOP} likeliest tokens")
    probabilities = tuple(weight / total for weight in weights)
    mean = math.fsum(rating * p for rating, p in enumerate(probabilities, 1))
    return Reply(f"{PREFIX}{mean:.4f}]]", "stop", client.model, probabilities)


def ratings(first: Mapping[str, float], after_one: Mapping[str, float]) -> list[float]:
    """Unnormalised probabilities of the complete strings "1" to "10".

    Args:
        first: probabilities of the token after the prefix, by its text.
        after_one: the same after the prefix and "1".
    """
    zero = after_one.get("0", 0.0)
    one = first.get("1", 0.0)
    digits = [first.get(str(digit), 0.0) for digit in range(2, 10)]
    return [one * (1 - zero), *digits, first.get("10", 0.0) + one * zero]


def _distribution(client: JudgeClient, prompt: str, extra_body: Mapping[str, Any]) -> dict[str, float]:
    body = {"prompt": prompt, "n_predict": 1, "n_probs": TOP, "temperature": 0, "stream": False, **extra_body}
    reply = client.post("/completion", body)
    try:
        found = reply["completion_probabilities"][0]["top_logprobs"]
        pairs = [(entry["token"], math.exp(entry["logprob"])) for entry in found]
    except (KeyError, IndexError, TypeError):
        raise JudgeRejected(
            "the server gives no probabilities: judge.rating=expected needs llama.cpp's server"
        ) from None
    return dict(pairs)
