"""An adapter trained on one base and served on another: what each pair loses on the handbook.

    python benchmarks/train_serve.py --out results/two_core_cpu/train_serve
    python benchmarks/train_serve.py --table results/two_core_cpu/train_serve

For each base in ``--train``, ``train.py experiment=handbook`` makes an adapter; for each way of serving, ``evaluate.py
task=text`` answers the test split with it. ``merged_BASE`` merges the adapter into the unquantized base first
(``tasks.merge``) and quantizes the result, a file for llama.cpp among the kinds; ``nf4_loftq`` and ``none_pissa`` are
trained from these starts. Each pair leaves ``OUT/TRAIN/SERVE/record.json``; then one process for each
trained adapter compares next-token distributions: ``OUT/TRAIN/kl.json`` has, for each way of serving, the mean KL
divergence (nats/token) from the adapter on the base that it was trained on, along the reference answers of the test
split, its bootstrap 95 % interval over questions, and how often the likeliest token is the same (not for llama.cpp's
files, which another engine runs). What is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import rows as common

from llm_at_home.records import store
from llm_at_home.records.provenance import collect
from llm_at_home.reporting import facts

BASES = {
    "none": ["quant=none"],
    "bfloat16": ["quant=none", "dtype=bfloat16"],
    "int8": ["quant=int8"],
    "nf4": ["quant=nf4"],
    "gptq": ["quant=gptq"],
}
RANK = ["adapter.r=32", "adapter.lora_alpha=32"]  # the experiment's
STARTS = {
    "nf4_loftq": ["quant=nf4", "adapter=lora_loftq", *RANK],
    "none_pissa": ["quant=none", "adapter=lora_pissa", *RANK],
}
TRAINED = {**BASES, **STARTS}
FILES = {f"gguf_{kind}": ["quant=gguf", f"quant.type={kind}"] for kind in ("Q8_0", "Q4_1")}
MERGED = "merged_"
MADE = {name: BASES[name] for name in ("none", "nf4", "int8", "gptq")} | FILES
SERVED = [*BASES, *(f"{MERGED}{name}" for name in MADE)]
TRAIN = "train"
HEADLINE = ("exact_match", "token_f1")
WEIGHTS = common.ROOT / "multirun" / "train_serve"  # too large to be kept with the records


def pair(run: Path, serve: str) -> list[str]:
    """The overrides of ``evaluate.py`` that serve the adapter of a training run so."""
    if serve.startswith(MERGED):
        source = [f"model.source={run}/merged", "model.name=smollm2_merged"]
        return [*source, *MADE[serve.removeprefix(MERGED)]]
    return [f"adapter_path={run}", *BASES[serve]]


def measure(args: argparse.Namespace) -> int:
    """Run what is not there yet; 1 when something left no usable record."""
    failed = False
    for name in args.train:
        run, out = WEIGHTS / name, args.out / name
        if common.status(out / TRAIN) != "ok" or not (run / "adapter").is_dir():
            words = ["train.py", "experiment=handbook", "logger=none", "rerun=true", *TRAINED[name], *args.overrides]
            subprocess.run([sys.executable, *words, f"hydra.run.dir={run}"], cwd=common.ROOT, capture_output=True)
            store.save(store.load(run), out / TRAIN)
            print(f"{name}: trained, {common.status(out / TRAIN)}", flush=True)
        if any(serve.startswith(MERGED) for serve in args.serve) and not (run / "merged").is_dir():
            words = ["-m", "llm_at_home.tasks.merge", f"adapter_path={run}", f"out={run}/merged"]
            folder = f"hydra.run.dir={run}/merge_run"
            subprocess.run([sys.executable, *words, folder, *args.overrides], cwd=common.ROOT, capture_output=True)
        for serve in args.serve:
            if common.status(out / serve) in common.DONE:
                continue
            words = ["evaluate.py", "task=text", "logger=none", "text.perplexity=false", *pair(run, serve)]
            print(f"{name} ->", common.run_row(serve, [*words, *args.overrides], out, HEADLINE), flush=True)
            failed |= common.status(out / serve) not in common.DONE
        compared = _compared(out)["served"]
        left = [one for one in args.serve if one not in compared and one.removeprefix(MERGED) not in FILES]
        if left:
            words = [__file__, "--kl", name, "--out", str(args.out), "--serve", *left, "--", *args.overrides]
            failed |= subprocess.run([sys.executable, *words]).returncode != 0
    print(table(args.out))
    return int(failed)


def divergences(args: argparse.Namespace) -> int:
    """The KL divergence of every way of serving one adapter, in this process."""
    import torch

    from llm_at_home.adapters.attach import attach_saved
    from llm_at_home.data.sources import load_group
    from llm_at_home.evaluation.fidelity.passages import Passage
    from llm_at_home.evaluation.fidelity.predictions import predict, score
    from llm_at_home.models.chat import prompt_ids
    from llm_at_home.models.loading import load_tokenizer
    from llm_at_home.quantization.base import load_base

    name = args.kl
    run = WEIGHTS / name
    compared = _compared(args.out / name)
    found = compared["served"]
    config = resolved([*pair(run, name.partition("_")[0]), *args.overrides])
    tokenizer = load_tokenizer(config["model"])
    passages = []
    for one in load_group(config["data"], "test", config["limit"], config["seed"]).conversations:
        prompt = prompt_ids(tokenizer, one.messages[:-1])
        answer = tokenizer(one.messages[-1]["content"], add_special_tokens=False)["input_ids"]
        passages.append(Passage([*prompt, *answer, tokenizer.eos_token_id], first=len(prompt)))

    def load(config: dict[str, Any]) -> Any:
        torch.manual_seed(0)
        base = load_base(config)
        return attach_saved(base, config["adapter_path"]) if config["adapter_path"] else base

    trained = load(config)
    wanted = [predict(trained, passage, config["fidelity_top_k"]) for passage in passages]
    del trained
    for serve in args.serve:
        served = load(resolved([*pair(run, serve), *args.overrides]))
        found[serve] = summary([score(served, *both) for both in zip(passages, wanted, strict=True)])
        print(f"{name} -> {serve}: KL {found[serve]['kl']:.4f} nats/token", flush=True)
        del served
    text = json.dumps(
        {"trained_on": name, "provenance": [*compared["provenance"], collect()], "served": found}, indent=1
    )
    (args.out / name / "kl.json").write_text(text + "\n")
    return 0


def _compared(folder: Path) -> dict[str, Any]:
    """What ``kl.json`` in the folder has so far; the provenance of each sitting."""
    file = folder / "kl.json"
    return json.loads(file.read_text()) if file.is_file() else {"provenance": [], "served": {}}


def resolved(words: list[str]) -> dict[str, Any]:
    """The configuration of ``evaluate.py task=text`` with these overrides, as plain values."""
    from hydra import compose, initialize_config_dir

    from llm_at_home.tasks import resolve

    words = ["task=text", "logger=none", *words]
    with initialize_config_dir(str(common.ROOT / "conf"), version_base="1.3"):
        composed = compose("evaluate", words)
    config = resolve.resolve("evaluate", composed, words)
    resolve.check("evaluate", config)
    return {**config, "fidelity_top_k": composed.fidelity.baseline_top_k}


def summary(scores: list[Any]) -> dict[str, Any]:
    """Mean KL divergence and agreement over all tokens, with bootstrap intervals over questions."""
    import numpy as np

    from llm_at_home.evaluation.statistics import bootstrap_interval95

    tokens = np.array([len(one.kl) for one in scores])
    found: dict[str, Any] = {"questions": len(scores), "tokens": int(tokens.sum())}
    for key, sums in (
        ("kl", np.array([one.kl.sum() for one in scores])),
        ("top1_agreement", np.array([one.agrees.sum() for one in scores])),
    ):
        found[key] = float(sums.sum() / tokens.sum())
        found[f"{key}_interval95"] = bootstrap_interval95(
            len(scores), lambda chosen, sums=sums: float(sums[chosen].sum() / tokens[chosen].sum())
        )
    return found


def table(folder: Path) -> str:
    """Exact match of each pair, and the KL divergence from the pair that was trained, as Markdown."""
    text = []
    trained = [name for name in TRAINED if (folder / name).is_dir()]
    served = [serve for serve in SERVED if any(common.status(folder / name / serve) for name in trained)]
    for title, cell in (("exact match (%)", _match), ("KL divergence from the trained pair (nats/token)", _kl)):
        lines = [[f"{title}: trained on", *(f"served on {_title(name)}" for name in served)]]
        lines += [[_title(name), *(cell(folder / name, serve) for serve in served)] for name in trained]
        text.append(common.markdown(lines))
    return "\n\n".join(text)


def _title(name: str) -> str:
    """A pair's side as it is read: ``merged_gguf_Q8_0`` is "merged, gguf Q8_0"."""
    first, _, rest = name.partition("_")
    return f"{first} {rest}" if first == "gguf" else f"{first}, {_title(rest)}" if rest else first


def _match(folder: Path, serve: str) -> str:
    if common.status(folder / serve) is None:
        return common.DASH
    record = store.load(folder / serve)
    reading = record.quality.get("exact_match")
    if reading is None or reading.value is None:
        return facts.error_line(record) or common.DASH
    ends = "" if reading.interval95 is None else " [{:.1f}, {:.1f}]".format(*(100 * e for e in reading.interval95))
    return f"{100 * reading.value:.1f}{ends}"


def _kl(folder: Path, serve: str) -> str:
    found = _compared(folder)["served"].get(serve)
    if found is None:
        return common.DASH
    low, high = found["kl_interval95"]
    return f"{found['kl']:.4f} [{low:.4f}, {high:.4f}]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="measure, and keep each pair's record below this folder")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="print the tables of the records in this folder")
    parser.add_argument("--kl", choices=TRAINED, help=argparse.SUPPRESS)
    parser.add_argument("--train", nargs="+", choices=TRAINED, default=["none", "nf4"], metavar="BASE")
    parser.add_argument("--serve", nargs="+", choices=SERVED, default=SERVED, metavar="WAY")
    parser.add_argument("overrides", nargs="*", help="after --: overrides for every run, such as gpu=cpu")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return 0
    if args.out is None:
        parser.error("one of --out and --table is needed")
    return divergences(args) if args.kl else measure(args)


if __name__ == "__main__":
    sys.exit(main())
