"""OpenAI's Batch API: all requests in one file, answered within a day, at a lower price from some providers."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_at_home.evaluation.judge.budget import OverBudget, estimate_tokens
from llm_at_home.evaluation.judge.client import JudgeClient, JudgeDenied, JudgeOverBudget, JudgeUnreachable, Reply
from llm_at_home.records.store import write_json

ENDPOINT = "/v1/chat/completions"
#: Left in the run folder while a batch is under way, so that an interrupted run waits for it instead of paying again.
PENDING = "batch.json"
POLL_S = 10.0
_ENDED = ("completed", "failed", "expired", "cancelled")

Requests = Sequence[tuple[str, Mapping[str, Any]]]


def replies(
    client: JudgeClient,
    requests: Requests,
    folder: Path,
    poll_s: float = POLL_S,
    sleep: Callable[[float], object] = time.sleep,
) -> dict[str, Reply]:
    """The replies of one batch by key; what failed in it is not among them and can be asked for singly.

    Args:
        client: whose server, key and budget are used.
        requests: key and body of each.
        folder: of the run.
        poll_s: seconds between two looks at the batch.
        sleep: waits for the given seconds.

    Raises:
        JudgeDenied: when the server has no Batch API, or refuses the batch.
        JudgeOverBudget: when the batch could cost more than what is left.
        JudgeUnreachable: when the server does not answer; the batch goes on, and so does the same command.
    """
    import openai

    pending = folder / PENDING
    try:
        batch = _resumed(client, pending, [key for key, _ in requests]) or _submitted(client, requests, pending)
        while batch.status not in _ENDED:
            sleep(poll_s)
            batch = client.sdk.batches.retrieve(batch.id)
        if batch.status == "failed":
            pending.unlink(missing_ok=True)
            reasons = [error.message for error in (batch.errors.data if batch.errors and batch.errors.data else [])]
            raise JudgeDenied(client.redact(f"the batch was refused: {reasons[0] if reasons else 'no reason given'}"))
        found = _read(client, client.sdk.files.content(batch.output_file_id).text) if batch.output_file_id else {}
    except openai.APIStatusError as error:
        if error.status_code in (404, 405, 501):
            raise JudgeDenied(f"the judge at {client.base_url} has no Batch API: use judge.batch=false") from None
        raise JudgeUnreachable(
            client.redact(f"the Batch API: HTTP {error.status_code}: {error.message}")[:300]
        ) from None
    except openai.APIConnectionError as error:
        raise JudgeUnreachable(client.redact(f"the Batch API: {error.__cause__ or error}")[:300]) from None
    pending.unlink(missing_ok=True)
    return found


def _submitted(client: JudgeClient, requests: Requests, pending: Path) -> Any:
    _check_budget(client, requests)
    lines = [
        json.dumps({"custom_id": key, "method": "POST", "url": ENDPOINT, "body": dict(body)}) for key, body in requests
    ]
    upload = client.sdk.files.create(file=("judge.jsonl", io.BytesIO("\n".join(lines).encode())), purpose="batch")
    batch = client.sdk.batches.create(input_file_id=upload.id, endpoint=ENDPOINT, completion_window="24h")
    write_json(pending, {"batch": batch.id, "keys": [key for key, _ in requests]})
    return batch


def _resumed(client: JudgeClient, pending: Path, keys: list[str]) -> Any:
    """The batch under way, if it is one of these requests."""
    if not pending.is_file():
        return None
    left = json.loads(pending.read_text(encoding="utf-8"))
    # Further judgments may have come to disk since; those that the batch lacks are asked for singly.
    return client.sdk.batches.retrieve(left["batch"]) if set(keys) & set(left["keys"]) else None


def _check_budget(client: JudgeClient, requests: Requests) -> None:
    longest = [int(body.get("max_tokens") or 0) for _, body in requests]
    prompts = sum(estimate_tokens(body["messages"]) for _, body in requests)
    try:
        client.budget.release(client.budget.reserve(prompts, sum(longest)), billed=False)
    except OverBudget as error:
        raise JudgeOverBudget(str(error)) from None


def _read(client: JudgeClient, text: str) -> dict[str, Reply]:
    from openai.types.chat import ChatCompletion

    found = {}
    for line in text.splitlines():
        if not line.strip():
            continue
        row = json.loads(line)
        response = row.get("response") or {}
        body = response.get("body") or {}
        if response.get("status_code") != 200:
            continue
        try:
            found[row["custom_id"]] = client.read(ChatCompletion.model_validate(body))
        except ValueError:
            continue
        usage = body.get("usage") or {}
        asked, answered = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        client.budget.spend(asked, answered)
        client.count(calls=1, prompt_tokens=asked, completion_tokens=answered)
    return found
