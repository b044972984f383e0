"""Evaluation: a judge over a run's answers, or a model over a data set's test split."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_at_home.pruning.naming import prune_words
from llm_at_home.records import store
from llm_at_home.records.schema import Record
from llm_at_home.records.tracking import Tracker
from llm_at_home.tasks import harness, judging


def run(config: dict[str, Any], folder: Path, record: Record, tracker: Tracker | None) -> None:
    """Fill ``record.quality``.

    Args:
        config: a resolved configuration of ``conf/evaluate.yaml``; ``task`` says which evaluation.
        folder: the run folder; judgments or answers are written there.
        record: filled in as the run goes.
        tracker: MLflow, or None.
    """
    stories = {
        "judge": judging.judge,
        "judge_check": judging.check,
        "text": _text,
        "fidelity": _fidelity,
        "harness": harness.evaluate,
    }
    stories[config["task"]](config, folder, record)


def _text(config: Mapping[str, Any], folder: Path, record: Record) -> None:
    """Text metrics and costs on the test split, and perplexity of its references and of general questions' ones."""
    from llm_at_home.data.questions import load_questions
    from llm_at_home.data.sources import load_group
    from llm_at_home.evaluation.perplexity import conversation_perplexity
    from llm_at_home.evaluation.retrieval import retrieval_recall
    from llm_at_home.evaluation.text import text_quality
    from llm_at_home.tasks import text
    from llm_at_home.tasks.infer import load_engine

    if config["adapter_path"]:
        record.subject = _training_run(config["adapter_path"])
        trained_on = record.subject["config"]["quant"]["name"] if record.subject else config["quant"]["name"]
        if trained_on != config["quant"]["name"]:
            record.notes.append(f"trained on quant={trained_on}, evaluated on quant={config['quant']['name']}")
        bases = [_prune_words(one) for one in (record.subject["config"] if record.subject else config, config)]
        if bases[0] != bases[1]:
            record.notes.append(f"trained on prune={bases[0]}, evaluated on prune={bases[1]}")
    loaded = load_group(config["data"], "test", config["limit"], config["seed"])
    asked = text.ask(config, loaded.conversations)
    engine = load_engine(config)
    predictions = text.answer(config, engine, asked, record)
    record.kernel = engine.describe()  # a layer may choose its kernel at its first call
    text.write(folder, loaded.conversations, asked, predictions)
    references = [c.messages[-1]["content"] for c in loaded.conversations]
    kinds = [c.kind for c in loaded.conversations]
    refusals = {reference for kind, reference in zip(kinds, references, strict=True) if kind == "refusal"}
    refusal = refusals.pop() if len(refusals) == 1 else None
    record.quality |= text_quality(kinds, predictions, references, refusal)
    if any(asked.passages):
        record.quality["retrieval_recall"] = retrieval_recall(asked.passages, references, kinds)
    texts = {
        "perplexity_test": asked.messages,
        "perplexity_home_bench": [_conversation(q) for q in load_questions("home_bench") if q.reference],
    }
    for name, conversations in texts.items() if config["text"]["perplexity"] else ():
        record.quality[name] = conversation_perplexity(engine.model, engine.tokenizer, conversations)
    record.counts |= {"questions": len(kinds), "bad_lines": len(loaded.bad_lines)}


def _fidelity(config: Mapping[str, Any], folder: Path, record: Record) -> None:
    """The quantized model against its own unquantized baseline, on held-out texts and on the baseline's answers."""
    from llm_at_home.evaluation import fidelity
    from llm_at_home.evaluation.fidelity import figures, passages
    from llm_at_home.evaluation.fidelity.baseline import Baseline
    from llm_at_home.evaluation.fidelity.predictions import score
    from llm_at_home.models.loading import load_tokenizer
    from llm_at_home.pruning.base import load_base
    from llm_at_home.quantization.base import describe_kernel, method_of
    from llm_at_home.quantization.size import size_readings

    options = config["fidelity"]
    tokenizer = load_tokenizer(config["model"])
    baseline = Baseline(config, tokenizer)
    sets = {fidelity.HELD_OUT: passages.held_out(tokenizer, config["limit"], options["max_length"])}
    if options["answer_tokens"]:
        prompts = passages.first_turns(tokenizer, config["limit"])
        answers = baseline.answers(prompts, options["answer_tokens"], options["answers_seed"])
        sets[fidelity.OWN_ANSWERS] = answers
    predicted = {name: baseline.predictions(chosen, options["baseline_top_k"]) for name, chosen in sets.items()}
    baseline.release()

    model = load_base(config)
    record.readings |= size_readings(model)
    method = figures.METHOD
    if getattr(method_of(config["quant"]), "DENSE_COPY", False):
        method += "/dequantized_weights"
        record.notes.append("measured on dequantized weights: what the format's own kernels round beside is not in it")
    rows = []
    for name, chosen in sets.items():
        predictions, baseline_hash = predicted[name]
        pairs = zip(chosen, predictions, strict=True)
        own = figures.rows(name, [score(model, passage, prediction) for passage, prediction in pairs])
        suffix = fidelity.SUFFIXES[name]
        sums = figures.Sums.of(own, name)
        record.quality |= figures.fidelity_readings(sums, suffix, options["baseline_top_k"], method)
        record.counts |= {f"texts{suffix}": len(chosen), f"tokens{suffix}": sum(one.tokens for one in chosen)}
        hashes = {"texts": passages.passages_hash(chosen), "baseline": baseline_hash}
        record.provenance.setdefault("fidelity", {})[name] = hashes
        rows += own
    record.kernel = describe_kernel(model)  # a layer may choose its kernel at its first call
    with (folder / fidelity.ROWS).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def _training_run(adapter_path: str) -> dict[str, Any] | None:
    """The training run that an adapter comes from, or None where its folder is no run's."""
    from llm_at_home.errors import Refusal

    for folder in (Path(adapter_path), Path(adapter_path).parent):
        try:
            return judging.subject(store.load(folder), folder)
        except Refusal:
            continue
    return None


def _prune_words(config: Mapping[str, Any]) -> str:
    return ", ".join(prune_words(config.get("prune"))) or "none"


def _conversation(question: Any) -> list[dict[str, str]]:
    return [
        message
        for asked, answered in zip(question.turns, question.reference, strict=True)
        for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})
    ]
