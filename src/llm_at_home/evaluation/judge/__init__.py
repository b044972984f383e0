"""The MT-bench judge: a language model grades answers, alone (1 to 10) or against a baseline's.

The protocol, templates and file format are those of Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench
and Chatbot Arena", and of their FastChat ``llm_judge``; where this differs, the function says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llm_at_home.errors import Refusal

if TYPE_CHECKING:
    from contextlib import ExitStack

    from llm_at_home.evaluation.judge.client import JudgeClient
    from llm_at_home.evaluation.judge.prompts import Question, Templates
    from llm_at_home.records.schema import Reading

MODES = ("single", "pairwise", "both")
JUDGMENTS = "judgments.jsonl"

_Row = dict[str, Any]


def check(config: Mapping[str, Any], has_baseline: bool = False) -> None:
    """Refuse what cannot work, before anything is loaded or asked.

    Args:
        config: the group ``judge`` as plain values.
        has_baseline: whether there are answers to compare with.

    Raises:
        Refusal: with one line that says what to change; it never holds a key.
    """
    name = config["name"]
    if config["mode"] not in MODES:
        raise Refusal(f"judge.mode={config['mode']} is unknown: choose one of {', '.join(MODES)}")
    if config["mode"] != "single" and not has_baseline:
        raise Refusal(f"judge.mode={config['mode']} compares two runs: give the other one as baseline=RUN_FOLDER")
    if not config.get("model"):
        raise Refusal(f"judge={name} needs judge.model=NAME, the exact name that the server knows")
    for key, least in (("max_tokens", 1), ("timeout_s", 0.001), ("max_retries", 0), ("concurrency", 1)):
        if config.get(key) is not None and config[key] < least:
            raise Refusal(f"judge.{key}={config[key]} is too small: the least is {least}")
    _check_server(config)
    _api_key(config)
    _templates(config)


def judge_run(
    config: Mapping[str, Any],
    questions: Iterable[Question],
    answers: Iterable[_Row],
    baseline_answers: Iterable[_Row] | None,
    folder: Path,
) -> tuple[dict[str, Reading], dict[str, int]]:
    """Judge a run's answers; judgments already in ``folder`` are kept and not asked for again.

    Args:
        config: the group ``judge`` as plain values.
        questions: with one or two turns each.
        answers: FastChat's answer rows of the run that is judged.
        baseline_answers: those of the run to compare with, for ``mode`` pairwise and both.
        folder: where ``judgments.jsonl`` lies or is made.

    Returns:
        Readings ``judge_score_*`` in points and ``win_rate*`` from 0 to 1, and counts. ``judgments`` and
        ``judgments_missing`` are about the whole file, ``judge_*`` about what this run asked; on a resumed
        run the latter can be 0. ``answers_missing`` counts turns that no answer could be found for.

    Raises:
        Refusal: for what :func:`check` finds, or answers in another format.
        JudgeError: when the judge denies access or is down; what was judged before is kept.
    """
    from contextlib import ExitStack

    from llm_at_home.evaluation.judge.client import Counts
    from llm_at_home.evaluation.judge.items import Item, judgment_key
    from llm_at_home.evaluation.judge.pairwise import pair_items
    from llm_at_home.evaluation.judge.run import run_items
    from llm_at_home.evaluation.judge.single import single_items
    from llm_at_home.evaluation.judge.summary import pair_readings, single_readings, tally
    from llm_at_home.records.jsonl import JsonlLog

    check(config, has_baseline=baseline_answers is not None)
    questions, answers, templates, setup = list(questions), list(answers), _templates(config), _setup(config)
    items: list[Item] = []
    unanswered = 0
    if config["mode"] != "pairwise":
        single, gaps = single_items(questions, answers, templates, setup, _grammar(config, "single"))
        items, unanswered = [*items, *single], unanswered + gaps
    if config["mode"] != "single":
        others = list(baseline_answers or [])
        pairs, gaps = pair_items(questions, answers, others, templates, setup, _grammar(config, "pairwise"))
        items, unanswered = [*items, *pairs], unanswered + gaps

    wanted = {item.key for item in items}
    counts, lost = Counts(), []
    with ExitStack() as stack:
        log = stack.enter_context(JsonlLog(folder / JUDGMENTS, key=judgment_key))
        done = log.keys()
        pending = [item for item in items if item.key not in done]
        if pending:
            client = _connect(config, stack)
            counts = client.counts
            lost = run_items(pending, log, client, config.get("concurrency") or 1)
        # The file may hold judgments of other answers or another judge; they are not this run's.
        rows = [row for row in log.rows() if judgment_key(row) in wanted] + lost

    label = _label(config)
    single_rows = [row for row in rows if "model" in row]
    pair_rows = [row for row in rows if "model" not in row]
    readings: dict[str, Reading] = {}
    if config["mode"] != "pairwise":
        readings |= single_readings(single_rows, label)
    if config["mode"] != "single":
        readings |= pair_readings(pair_rows, label)
    return readings, {
        **tally(single_rows, pair_rows),
        "answers_missing": unanswered,
        "judge_calls": counts.calls,
        "judge_retries": counts.retries,
        "judge_failures": counts.failures,
        "judge_prompt_tokens": counts.prompt_tokens,
        "judge_completion_tokens": counts.completion_tokens,
    }


def _connect(config: Mapping[str, Any], stack: ExitStack) -> JudgeClient:
    from llm_at_home.evaluation.judge.client import JudgeClient
    from llm_at_home.evaluation.judge.local import LocalServer, find_gguf

    base_url, api_key = config.get("base_url"), _api_key(config)
    if _embedded(config):
        server = stack.enter_context(
            LocalServer(
                find_gguf(config["gguf"]),
                alias=config["model"],
                context=config.get("context") or 8192,
                parallel=config.get("concurrency") or 1,
                threads=config.get("threads"),
            )
        )
        base_url, api_key = server.base_url, server.api_key
    return stack.enter_context(
        JudgeClient(
            config["model"],
            str(base_url),
            api_key=api_key,
            temperature=config.get("temperature"),
            max_tokens=config.get("max_tokens"),
            timeout_s=config.get("timeout_s") or 120.0,
            max_retries=config.get("max_retries") or 0,
            extra_body=dict(config.get("extra_body") or {}),
        )
    )


def _embedded(config: Mapping[str, Any]) -> bool:
    """Whether this judge brings its own server: its config names a model file and no address."""
    return config.get("base_url") is None and "gguf" in config


def _check_server(config: Mapping[str, Any]) -> None:
    if _embedded(config):
        from llm_at_home.evaluation.judge.local import find_gguf

        find_gguf(config["gguf"])
        return
    address = urlsplit(config.get("base_url") or "")
    if address.scheme not in ("http", "https") or not address.hostname:
        raise Refusal(f"judge={config['name']} needs judge.base_url=http://HOST:PORT/v1")
    if address.username or address.password or address.query:
        raise Refusal("judge.base_url must not hold a key: name its environment variable in judge.api_key_env")


def _api_key(config: Mapping[str, Any]) -> str | None:
    variable = config.get("api_key_env")
    if variable is None or _embedded(config):
        return None
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        # Not repeated in the message: it may be the key itself.
        raise Refusal("judge.api_key_env must be the NAME of an environment variable, never the key itself")
    key = os.environ.get(variable, "").strip()
    if not key:
        raise Refusal(
            f"judge={config['name']} needs a key in the environment variable {variable}: "
            f"export {variable}=..., or use judge=local, which needs none"
        )
    if not (key.isascii() and key.isprintable()):
        raise Refusal(f"the key in {variable} holds characters that no HTTP header can carry")
    return key


def _templates(config: Mapping[str, Any]) -> Templates:
    from llm_at_home.evaluation.judge.prompts import Templates, default_path

    return Templates(Path(config["templates"]) if config.get("templates") else default_path())


def _setup(config: Mapping[str, Any]) -> dict[str, Any]:
    """What, beside the prompt, can change a judgment."""
    names = ("model", "temperature", "max_tokens", "extra_body", "context", "gguf")
    return {name: config.get(name) for name in names}


def _grammar(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    grammar = (config.get("grammar") or {}).get(kind)
    return {"grammar": grammar} if grammar else {}


def _label(config: Mapping[str, Any]) -> str:
    """The judge's name in a reading's method, with the model beside it where a grammar shapes its replies."""
    if config.get("grammar"):
        return f"{config['name']}[{config['model']}, grammar]"
    return str(config["name"])
