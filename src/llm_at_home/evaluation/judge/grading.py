"""From judgments to be had to their rows: connects the judge, keeps the log, and counts what it took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_at_home.evaluation.judge import settings
from llm_at_home.evaluation.judge.asking import PAIRWISE, SINGLE, Judge
from llm_at_home.evaluation.judge.budget import USUAL_BYTES_PER_TOKEN, Budget, estimate_tokens
from llm_at_home.evaluation.judge.cache import ReplyCache, cache_path
from llm_at_home.evaluation.judge.client import Counts, JudgeClient, JudgeError
from llm_at_home.evaluation.judge.items import Item, Row, judgment_key
from llm_at_home.evaluation.judge.limits import RateLimit
from llm_at_home.evaluation.judge.run import run_items
from llm_at_home.records.jsonl import JsonlLog
from llm_at_home.records.schema import Reading

JUDGMENTS = "judgments.jsonl"
#: Judgments that a folder holds of other answers or another judge, which are no part of its record.
PREVIOUS = "judgments.previous.jsonl"


@dataclass
class Graded:
    """Rows of the judgments wanted, those of an earlier run among them, and what this run's asking took."""

    rows: list[Row] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    costs: dict[str, Reading] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """What a run would ask, before it asks.

    Prompt tokens are estimated at four bytes each. ``least_usd`` is for the prompts alone, ``most_usd`` with every
    reply as long as ``judge.max_tokens``; None where no price is known. Replies that are unreadable or lost cost extra.
    """

    judgments: int
    calls: int
    cached: int
    prompt_tokens: int
    most_reply_tokens: int | None
    least_usd: float | None
    most_usd: float | None

    def as_text(self) -> str:
        """A line a figure."""
        usd = "unknown: no price is known" if self.least_usd is None else f"at least {self.least_usd:.4f} USD"
        usd += f", at most {self.most_usd:.4f} USD" if self.most_usd is not None else ""
        most = "unlimited" if self.most_reply_tokens is None else f"at most {self.most_reply_tokens:,}"
        return (
            f"judgments: {self.judgments:,}\ncalls: {self.calls:,} (and {self.cached:,} replies kept from before)\n"
            f"prompt tokens: about {self.prompt_tokens:,}\nreply tokens: {most}\ncost: {usd}"
        )


def grade(config: Mapping[str, Any], items: Sequence[Item], folder: Path) -> Graded:
    """Get all judgments that ``folder`` lacks.

    Raises:
        Refusal: when the prompts alone would cost more than the budget.
        JudgeError: when the judge denies access, is down, or is at its budget's end; its ``counts`` say what was asked.
    """
    from llm_at_home.errors import Refusal

    graded = Graded()
    wanted = {item.key for item in items}
    counts, budget, lost = Counts(), _budget(config), []
    with ExitStack() as stack:
        log = stack.enter_context(JsonlLog(folder / JUDGMENTS, key=judgment_key))
        log.keep(wanted, folder / PREVIOUS)
        done = log.keys()
        pending = [item for item in items if item.key not in done]
        if pending:
            cache = stack.enter_context(_cache(config))
            expected = estimate(config, pending, cache)
            if config.get("max_cost_usd") is not None and (expected.least_usd or 0) > config["max_cost_usd"]:
                raise Refusal(
                    f"judge.max_cost_usd={config['max_cost_usd']:g}: the prompts alone cost about "
                    f"{expected.least_usd:.2f} USD; give limit=, or a higher limit"
                )
            judge = _connect(config, cache, budget, stack)
            counts = judge.client.counts
            try:
                if config.get("batch"):
                    _ask_in_a_batch(judge, pending, folder)
                lost = run_items(pending, log, judge, config.get("concurrency") or 1)
            except JudgeError as error:
                error.counts, error.costs = _counts(counts), {"judge_cost": budget.reading()}
                raise
        graded.rows = log.rows() + lost
    graded.counts = _counts(counts)
    graded.costs = {"judge_cost": budget.reading()}
    return graded


def estimate(config: Mapping[str, Any], items: Sequence[Item], cache: ReplyCache | None = None) -> Estimate:
    """What these judgments would take; nothing is asked."""
    with ExitStack() as stack:
        kept = cache or stack.enter_context(_cache(config))
        judge = _judge(config, None, kept)
        asked = [request for item in items for request in item.requests]
        new = [request for request in asked if not judge.knows(*request)]
    prompts = sum(estimate_tokens(messages, USUAL_BYTES_PER_TOKEN) for _, messages, _ in new)
    longest = config.get("max_tokens")
    budget = _budget(config)
    return Estimate(
        judgments=len(items),
        calls=len(new),
        cached=len(asked) - len(new),
        prompt_tokens=prompts,
        most_reply_tokens=None if longest is None else longest * len(new),
        least_usd=budget.cost(prompts, 0) if budget.is_priced else None,
        most_usd=budget.cost(prompts, longest * len(new)) if budget.is_priced and longest is not None else None,
    )


@contextmanager
def _cache(config: Mapping[str, Any]) -> Iterator[ReplyCache]:
    cache = ReplyCache(cache_path() if config.get("cache") else None)
    try:
        yield cache
    finally:
        cache.close()


def _budget(config: Mapping[str, Any]) -> Budget:
    prices = config.get("prices") or {}
    share = prices.get("batch_share") if config.get("batch") else None
    return Budget(prices, config.get("max_cost_usd"), 1.0 if share is None else share)


def _judge(config: Mapping[str, Any], client: Any, cache: ReplyCache) -> Judge:
    bodies = {kind: settings.grammar(config, kind) for kind in (SINGLE, PAIRWISE)}
    return Judge(client, cache, settings.setup(config), bodies, expects=config.get("rating") == "expected")


def _connect(config: Mapping[str, Any], cache: ReplyCache, budget: Budget, stack: ExitStack) -> Judge:
    from llm_at_home.evaluation.judge.local import LocalServer, find_gguf

    base_url, key = config.get("base_url"), settings.api_key(config)
    if settings.embedded(config):
        server = stack.enter_context(
            LocalServer(
                find_gguf(config["gguf"]),
                alias=config["model"],
                context=config.get("context") or 8192,
                parallel=config.get("concurrency") or 1,
                threads=config.get("threads"),
            )
        )
        base_url, key = server.base_url, server.api_key
    client = JudgeClient(
        config["model"],
        str(base_url),
        api_key=key,
        temperature=config.get("temperature"),
        max_tokens=config.get("max_tokens"),
        timeout_s=config.get("timeout_s") or 120.0,
        max_retries=config.get("max_retries") or 0,
        extra_body=dict(config.get("extra_body") or {}),
        limit=RateLimit(config.get("requests_per_minute"), config.get("tokens_per_minute")),
        budget=budget,
    )
    return _judge(config, stack.enter_context(client), cache)


def _ask_in_a_batch(judge: Judge, items: Sequence[Item], folder: Path) -> None:
    from llm_at_home.evaluation.judge import batch

    asked = {judge.key(*request): request for item in items for request in item.requests if not judge.knows(*request)}
    if asked:
        requests = [(key, judge.request(kind, messages)) for key, (kind, messages, _) in asked.items()]
        judge.batched = batch.replies(judge.client, requests, folder)
        judge.client.budget.share = 1.0  # what the batch lacks is asked for singly, at full price


def _counts(counts: Counts) -> dict[str, int]:
    return {
        "judge_calls": counts.calls,
        "judge_retries": counts.retries,
        "judge_failures": counts.failures,
        "judge_prompt_tokens": counts.prompt_tokens,
        "judge_completion_tokens": counts.completion_tokens,
    }
