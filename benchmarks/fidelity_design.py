"""What the design of task=fidelity costs in exactness: the figures of docs/fidelity.md's last two tables.

python benchmarks/fidelity_design.py lumping  # KL with k tokens kept, over the whole KL (five minutes on two cores)
python benchmarks/fidelity_design.py draws    # nf4 under ten draws of the baseline's answers (10 minutes on two cores)
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir

from llm_at_home.evaluation.fidelity import OWN_ANSWERS, passages
from llm_at_home.evaluation.fidelity.baseline import Baseline
from llm_at_home.evaluation.fidelity.figures import FIGURES, Sums, rows
from llm_at_home.evaluation.fidelity.predictions import predict, score
from llm_at_home.evaluation.statistics import bootstrap_draws, interval95
from llm_at_home.models.loading import load_tokenizer
from llm_at_home.quantization.base import load_base
from llm_at_home.tasks import resolve

CONF = Path(__file__).resolve().parent.parent / "conf"
METHODS = {
    "8 bits": ("quant=rtn", "quant.group_size=32", "quant.bits=8"),
    "4 bits": ("quant=rtn", "quant.group_size=32", "quant.bits=4"),
    "2 bits": ("quant=rtn", "quant.group_size=32", "quant.bits=2"),
    "nf4": ("quant=nf4",),
    "bfloat16": ("dtype=bfloat16",),
}
KEPT = (64, 256, 1024, 4096)
TEXTS = 8
DRAWS = 10


def config(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolve.resolve("evaluate", compose("evaluate", ["task=fidelity", *overrides]), overrides)


def lumping() -> None:
    """The share of the whole KL divergence that is left when only the k likeliest tokens are told apart."""
    plain = config()
    texts = passages.held_out(load_tokenizer(plain["model"]), TEXTS, plain["fidelity"]["max_length"])
    model = load_base(plain)
    whole = model.config.vocab_size
    kept = {k: [predict(model, text, k) for text in texts] for k in (*KEPT, whole)}
    print(f"{sum(text.tokens for text in texts)} tokens; kept, then mean and 99th percentile over those of all {whole}")
    for name, overrides in METHODS.items():
        model = load_base(config(*overrides))
        kl = {k: np.concatenate([score(model, *one).kl for one in zip(texts, kept[k], strict=True)]) for k in kept}
        for k in KEPT:
            mean, p99 = (statistic(kl[k]) / statistic(kl[whole]) for statistic in (np.mean, p99_of))
            print(f"{name:10} {k:6} {mean:.3f} {p99:.3f}", flush=True)


def p99_of(values: np.ndarray) -> float:
    return float(np.percentile(values, 99))


def draws() -> None:
    """How far figures on own answers scatter between draws, against the standard error that the bootstrap gives."""
    chosen = config("quant=nf4")
    tokenizer = load_tokenizer(chosen["model"])
    baseline, model = Baseline(chosen, tokenizer), load_base(chosen)
    prompts = passages.first_turns(tokenizer, None)
    options = chosen["fidelity"]
    found = []
    for seed in range(DRAWS):
        answers = baseline.answers(prompts, options["answer_tokens"], seed)
        predictions, _ = baseline.predictions(answers, options["baseline_top_k"])
        scores = [score(model, *one) for one in zip(answers, predictions, strict=True)]
        found.append(Sums.of(rows(OWN_ANSWERS, scores), OWN_ANSWERS))
        print(f"seed {seed}: {found[-1].tokens.sum():.0f} tokens", flush=True)
    print("figure, mean, deviation between draws, of a difference, by the bootstrap, pairs whose interval excludes 0")
    for name, (_, statistic) in FIGURES.items():
        values = np.array([statistic(sums, np.arange(len(sums))) for sums in found])
        pairs = [
            bootstrap_draws(len(a), lambda i, a=a, b=b, of=statistic: of(a, i) - of(b, i))
            for a, b in itertools.combinations(found, 2)
        ]
        excluded = sum(low > 0 or high < 0 for low, high in map(interval95, pairs))
        deviation, error = values.std(ddof=1), np.mean([one.std(ddof=1) for one in pairs])
        numbers = (values.mean(), deviation, deviation * 2**0.5, error)
        print(f"{name:20}", *(f"{number:.4f}" for number in numbers), f"{excluded} of {len(pairs)}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ("lumping", "draws"):
        sys.exit(str(__doc__))
    {"lumping": lumping, "draws": draws}[sys.argv[1]]()
