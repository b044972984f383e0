"""Tokens a second of one answer: engine=graph against transformers' generate, its defaults and its best documented way.

    python benchmarks/decode.py --out results/h100/decode                     # Llama-2-7B's shape, random weights
    python benchmarks/decode.py --out FOLDER --model smollm2_135m --tokens 32 # anywhere
    python benchmarks/decode.py --table results/h100/decode

Each method is a process of its own: the base is loaded once, our greedy tokens are compared with generate's, and then
all contenders answer in turn, several rounds. ``default`` is generate as it is, ``best_documented`` generate with a
static cache, which transformers compiles by itself on a GPU. Medians over rounds; J/token is the card's, gross. The
limit is what one step has to read (all weights but the embedding, and the cache at its mean length) over the bandwidth
of a copy on the same card in the same run. The file is written after each round; a method that has one is left alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import rows as common

# What the ratio is to be, by reference and method.
GOALS = {"default": {"none": 6.5, "nf4": 8.0, "gptq": 8.0, "awq": 8.0}, "best_documented": 1.5}
CONTENDERS = ("default", "best_documented", "ours")
SLOW_SECONDS = 5.0  # an answer that takes longer is measured once a round


def measure(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """All contenders of one method, in this process."""
    import torch

    from llm_at_home.generation.eager import EagerEngine
    from llm_at_home.generation.graph import GraphEngine
    from llm_at_home.generation.reply import Sampling
    from llm_at_home.quantization.base import describe_kernel
    from llm_at_home.records.provenance import collect

    start = time.perf_counter()
    config, model = common.load_decoded(args, method)
    loaded = time.perf_counter() - start
    device = config["gpu"]["device"]
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (args.prompt,), generator=generator).tolist()
    sampling = Sampling(args.tokens, ignore_eos=True)
    engines = {
        "default": EagerEngine(model, None, args.tokens),
        "best_documented": _static(model, args.tokens),
        "ours": GraphEngine(model, None, args.tokens, kernels=args.kernels),
    }
    result: dict[str, Any] = {
        "method": method,
        "protocol": {key: getattr(args, key) for key in ("model", "prompt", "tokens", "rounds", "passes")},
        "provenance": collect(),
        "kernel": describe_kernel(model),
        "load_seconds": loaded,
        "limit": limit(model, args, device),
        "contenders": {},
    }
    expected: list[int] = []
    for name in ("default", "ours", "best_documented"):
        if name not in args.contenders:
            continue
        one: dict[str, Any] = {"rates": [], "joules": [], "peaks": []}
        start = time.perf_counter()
        try:
            tokens = engines[name].reply(prompt, sampling).tokens
        except Exception as error:  # a reference that cannot run is a row with a reason
            one["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        else:
            one["first_answer_seconds"] = time.perf_counter() - start
            start = time.perf_counter()
            engines[name].reply(prompt, sampling)
            one["answer_seconds"] = time.perf_counter() - start
            expected = expected or tokens
            one["agreement"] = _agreement(model, prompt, expected, tokens)
        result["contenders"][name] = one
        print(f"{method} {name}: { ({k: v for k, v in one.items() if v}) }", flush=True)
    result["kernel"] = engines["ours"].describe()
    for turn in range(args.rounds):
        names = [name for name in args.contenders if "reason" not in result["contenders"][name]]
        for name in names if turn % 2 == 0 else names[::-1]:
            one = result["contenders"][name]
            slow = one["answer_seconds"] > SLOW_SECONDS
            _round(engines[name], one, prompt, sampling, 1 if slow else args.passes, device)
            common.write(result, args.out / f"{method}.json")
            print(f"{method} {name}: {result['contenders'][name]['rates'][-args.passes :]}", flush=True)
    return result


def _round(engine: Any, one: dict[str, Any], prompt: Any, sampling: Any, passes: int, device: str) -> None:
    import torch

    from llm_at_home.metering.energy import EnergyMeter

    def answer() -> Any:
        if hasattr(engine, "forget"):
            engine.forget()
        return engine.reply(prompt, sampling)

    answer()  # so that no other contender's pass is in the power's average
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with EnergyMeter(device, idle_seconds=0.0) as energy:
        energy.start()
        replies = [answer() for _ in range(passes)]
        energy.stop()
    reading = energy.readings("token", sum(len(reply.tokens) for reply in replies))["energy_per_token"]
    one["joules"].append(reading.value)
    one["rates"] += [len(reply.intervals) / sum(reply.intervals) for reply in replies]
    one["peaks"].append(torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None)


def _agreement(model: Any, prompt: list[int], expected: list[int], tokens: list[int]) -> dict[str, Any]:
    """Where two greedy answers part, and how close the two candidates' logits were there."""
    import torch

    same = next((i for i, (a, b) in enumerate(zip(expected, tokens, strict=False)) if a != b), None)
    if same is None:
        return {"tokens": len(tokens), "first_divergence": None}
    ids = torch.tensor([prompt + expected[:same]], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, logits_to_keep=1).logits[0, -1].float()
    gap = float(logits[expected[same]] - logits[tokens[same]])
    spacing = float(logits.abs().max()) * torch.finfo(model.dtype).eps
    return {"tokens": len(tokens), "first_divergence": same, "logit_gap": gap, "rounding_of_logits": spacing}


def limit(model: Any, args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Tokens a second if each step's bytes were read at the speed of a copy."""
    weights, of_a_token = common.read_in_a_step(model)
    cache = of_a_token * (args.prompt + args.tokens / 2)
    found: dict[str, Any] = {"weight_bytes": weights, "cache_bytes": cache}
    bandwidth = common.copy_bandwidth(device)
    pace = bandwidth / (weights + cache) if bandwidth else None
    return found | {"bandwidth": bandwidth, "tokens_per_second": pace}


def _static(model: Any, tokens: int) -> Any:
    """Generate with a static cache, which it then compiles."""
    from llm_at_home.generation.eager import EagerEngine

    class Static(EagerEngine):
        def _generate(self, *inputs: Any, **options: Any) -> Any:
            return super()._generate(*inputs, cache_implementation="static", **options)

    return Static(model, None, tokens)


def rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method and reference."""
    found = []
    for result in results:
        ours, protocol = result["contenders"]["ours"], result["protocol"]
        rate = _median(ours["rates"])
        ceiling = result["limit"]["tokens_per_second"]
        for name in ("default", "best_documented"):
            reference = result["contenders"].get(name)
            if reference is None:
                continue
            pace = _median(reference["rates"])
            goal = GOALS[name] if name == "best_documented" else GOALS[name].get(result["method"])
            found.append(
                {
                    "work": f"decode, batch 1, prompt {protocol['prompt']}, {protocol['tokens']} new",
                    "method": result["method"],
                    "ours": rate,
                    "reference": pace,
                    "reference_name": name,
                    "reason": reference.get("reason"),
                    "unit": "tokens/s",
                    "ratio": rate / pace if rate and pace else None,
                    "share_of_limit": rate / ceiling if rate and ceiling else None,
                    "joules": _median(ours["joules"]),
                    "reference_joules": _median(reference["joules"]),
                    "peak_gb": _median(ours["peaks"]),
                    "budget_gb": None,
                    "goal": goal,
                }
            )
    return found


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def table(folder: Path) -> str:
    """The methods of a folder as Markdown."""
    results = common.stored(folder)
    lines = [
        [
            *("quant", "ours (tokens/s)", "default", "best documented", "ours / default", "ours / best"),
            *("share of limit", "J/token, ours", "J/token, default", "peak (GB)", "first answer (s), ours", "best"),
            "greedy tokens",
        ]
    ]
    for result in results:
        pair = {row["reference_name"]: row for row in rows([result])}
        default, best = pair.get("default", {}), pair.get("best_documented", {})
        any_row = default or best
        ours = result["contenders"]["ours"]
        agreement = ours.get("agreement", {})
        parted = agreement.get("first_divergence")
        same = "equal" if parted is None else f"equal up to {parted}, then {agreement['logit_gap']:.3f} apart"
        lines.append(
            [
                result["method"],
                *(common.number(any_row.get(key), 1) for key in ("ours",)),
                *(common.number(row.get("reference"), 1) for row in (default, best)),
                *(common.number(row.get("ratio"), 2) for row in (default, best)),
                common.number(any_row.get("share_of_limit"), 2),
                *(common.number(default.get(key), 2) for key in ("joules", "reference_joules")),
                common.number(any_row.get("peak_gb"), 2),
                common.number(ours.get("first_answer_seconds"), 1),
                common.number(result["contenders"].get("best_documented", {}).get("first_answer_seconds"), 1),
                same,
            ]
        )
    return common.markdown(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--passes", type=int, default=3, help="answers of each contender in a round")
    parser.add_argument("--kernels", default="auto", choices=("auto", "triton", "torch"))
    return common.run_methods(parser, ["none", "nf4", "gptq", "awq"], measure, table, rows)


if __name__ == "__main__":
    sys.exit(main())
