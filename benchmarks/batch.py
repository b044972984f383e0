"""MT-bench's 80 two-turn conversations in one stream: engine=graph against one-at-a-time generate.

    python benchmarks/batch.py --out results/h100/batch                        # Llama-2-7B's shape, random weights
    python benchmarks/batch.py --out FOLDER --model smollm2_135m --questions 4 --tokens 16 --places 2
    python benchmarks/batch.py --table results/h100/batch
    python benchmarks/batch.py --out FOLDER --lengths benchmarks/mt_bench_lengths.json
    python benchmarks/batch.py --count-prompts                                 # count the questions' tokens again
    python benchmarks/batch.py --count-answers answers.jsonl                   # write mt_bench_lengths.json again

Random weights do not stop by themselves: every answer has ``--tokens`` tokens, the limit of MT-bench's protocol, or
those of ``--lengths FILE`` (a JSON list of [first, second] for each question; benchmarks/mt_bench_lengths.json has
those of ``infer.py questions=mt_bench quant=gguf quant.type=Q8_0``, two fifths of them cut off at 1,024). Prompts are
as long as the real questions' (benchmarks/mt_bench_prompts.json, counted with SmolLM2's tokenizer and template), and a
second turn's holds the first answer. Ours is all of them, a place being filled as soon as it is free and the cache, as
large as the card allows, has pages for it; the reference answers a sample one at a time, with generate's defaults,
warm, and is scaled to all tokens, as its row says. A method is a process of its own. The limit is what has to be read,
at the speed of a copy in the same process: the weights once for each token of the longest conversation, and each
token's keys and values once for every later one of its conversation.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rows as common

PROMPTS = Path(__file__).with_name("mt_bench_prompts.json")
LENGTHS = Path(__file__).with_name("mt_bench_lengths.json")
GOALS = {"seconds": 100.0, "joules": 30.0}
PLACES = 80


def measure(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """Ours on everything and the reference on a sample, in this process."""
    import torch

    from llm_at_home.generation.eager import EagerEngine
    from llm_at_home.generation.graph import GraphEngine
    from llm_at_home.generation.reply import Sampling
    from llm_at_home.records.provenance import collect

    config, model = common.load_decoded(args, method)
    device = config["gpu"]["device"]
    own = json.loads(PROMPTS.read_text())["tokens"][: args.questions]
    lengths = json.loads(args.lengths.read_text())[: len(own)] if args.lengths else [[args.tokens] * 2] * len(own)
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(0, model.config.vocab_size, (count,), generator=generator).tolist()

    firsts, added = [ids(first) for first, _ in own], [ids(second) for _, second in own]
    longest = max(a + b + sum(new) for (a, b), new in zip(own, lengths, strict=True))
    places = min(len(own), args.places)
    ceiling = limit(model, own, lengths, device)
    engine = GraphEngine(model, None, args.tokens, batch_size=places)

    def then(key: Any, reply: Any) -> Any:
        question, turn = key
        if turn == 1:
            return None
        prompt = [*firsts[question], *reply.tokens, *added[question]]
        return (question, 1), (prompt, Sampling(lengths[question][1], ignore_eos=True))

    requests = [((i, 0), (firsts[i], Sampling(lengths[i][0], ignore_eos=True))) for i in range(len(own))]
    # Half of them end with each of the last steps, so that a graph of each size is there.
    warm = [
        (key, (prompt, Sampling(16 - i.bit_length(), ignore_eos=True)))
        for i, (key, (prompt, _)) in enumerate(requests[:places])
    ]
    start = time.perf_counter()
    list(engine.stream(warm, longest=longest))
    result: dict[str, Any] = {
        "method": method,
        "protocol": {key: getattr(args, key) for key in ("model", "questions", "tokens", "sample")},
        "provenance": collect(),
        "places": places,
        "pages": engine.places(longest).pages.count,
        "warmup_seconds": time.perf_counter() - start,
        "kernel": engine.describe(),
        "limit": ceiling,
    }
    found, result["ours"] = _timed(
        device, lambda: list(engine.stream(requests, longest=longest, then=then)), lambda made: [r for _, r in made]
    )
    assert len(found) == 2 * len(own), "an answer is missing"
    print(f"{method} ours: {result['ours']}", flush=True)
    engine.close()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()  # kernels that the reference loads need memory of their own
    eager = EagerEngine(model, None, args.tokens)
    picked = firsts[:: max(1, len(firsts) // 3)][:3]

    def one_at_a_time() -> list[Any]:
        return [eager.reply(prompt, Sampling(args.sample, ignore_eos=True)) for prompt in picked]

    one_at_a_time()  # the first pass over lengths that were not decoded before is slow, and the whole would have few
    _, result["reference"] = _timed(device, one_at_a_time, lambda made: made)
    print(f"{method} reference: {result['reference']}", flush=True)
    return result


def limit(
    model: Any, prompts: Sequence[Sequence[int]], lengths: Sequence[Sequence[int]], device: str
) -> dict[str, Any]:
    """Seconds if all that has to be read were read at the speed of a copy, with a place for each conversation.

    Args:
        model: the causal language model.
        prompts: of each conversation, tokens of its first turn and of what its second adds.
        lengths: of each conversation, new tokens of both answers.
        device: ``cpu`` or ``cuda``.
    """
    weights, of_a_token = common.read_in_a_step(model)
    steps = max(sum(new) for new in lengths)
    seen = 0
    for (first, second), (answer, last) in zip(prompts, lengths, strict=True):
        before = first + answer + second
        seen += sum(range(first, first + answer)) + sum(range(before, before + last))
    bandwidth = common.copy_bandwidth(device)
    moved = steps * weights + seen * of_a_token
    found = {"weight_bytes": steps * weights, "cache_bytes": seen * of_a_token, "bandwidth": bandwidth}
    return found | {"seconds": moved / bandwidth if bandwidth else None}


def _timed(device: str, make: Any, replies: Any) -> tuple[Any, dict[str, Any]]:
    import torch

    from llm_at_home.metering.energy import EnergyMeter
    from llm_at_home.metering.timing import now

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with EnergyMeter(device, idle_seconds=0.0) as energy:
        energy.start()
        start = now(device)
        made = make()
        seconds = now(device) - start
        energy.stop()
    tokens = sum(len(reply.tokens) for reply in replies(made))
    joules = energy.readings("token", tokens)["energy_per_token"].value
    waits = [reply.time_to_first_token for reply in replies(made)]
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    return made, {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "joules_per_token": joules,
        "peak_gb": peak,
        "median_prefill_seconds": statistics.median(waits),
    }


def rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two rows a method: time and energy of the whole."""
    found = []
    for result in results:
        ours, reference = result["ours"], result["reference"]
        scaled = ours["tokens"] / reference["tokens_per_second"]
        fastest = result.get("limit", {}).get("seconds")  # older files have none
        work = f"{result['protocol']['questions']} two-turn conversations, {ours['tokens']:,} tokens"
        shared = {
            "work": work,
            "method": result["method"],
            "reference_name": f"default, one at a time, scaled from {reference['tokens']} tokens",
            "share_of_limit": fastest / ours["seconds"] if fastest else None,
            "peak_gb": ours["peak_gb"],
            "budget_gb": None,
        }
        joules = [one["joules_per_token"] and one["joules_per_token"] * ours["tokens"] for one in (ours, reference)]
        for unit, mine, theirs in (("seconds", ours["seconds"], scaled), ("joules", *joules)):
            ratio = theirs / mine if mine and theirs else None
            found.append(
                shared
                | {"unit": unit, "ours": mine, "reference": theirs, "ratio": ratio, "goal": GOALS[unit]}
                | {"joules": joules[0]}
            )
    return found


def table(folder: Path) -> str:
    """The methods of a folder as Markdown."""
    results = common.stored(folder)
    lines = [
        [
            *("quant", "places", "tokens", "ours (s)", "tokens/s", "J/token", "peak (GB)"),
            *("one at a time, scaled (s)", "tokens/s", "J/token", "times as fast", "of the energy"),
        ]
    ]
    for result in results:
        ours, reference = result["ours"], result["reference"]
        speed, energy = rows([result])
        lines.append(
            [
                result["method"],
                str(result["places"]),
                f"{ours['tokens']:,}",
                *(common.number(ours[key], digits) for key, digits in (("seconds", 1), ("tokens_per_second", 0))),
                *(common.number(ours[key], digits) for key, digits in (("joules_per_token", 3), ("peak_gb", 1))),
                common.number(speed["reference"], 0),
                common.number(reference["tokens_per_second"], 1),
                common.number(reference["joules_per_token"], 2),
                common.number(speed["ratio"], 1),
                common.DASH if energy["ratio"] is None else f"1/{energy['ratio']:.1f}",
            ]
        )
    return common.markdown(lines)


def count_prompts() -> None:
    """Write PROMPTS: tokens of each question's first turn, and of what its second turn adds."""
    from hydra import compose, initialize_config_dir

    from llm_at_home.data.questions import load_questions
    from llm_at_home.models.chat import prompt_ids
    from llm_at_home.models.loading import load_tokenizer
    from llm_at_home.tasks import resolve

    with initialize_config_dir(str(common.ROOT / "conf"), version_base="1.3"):
        config = resolve.resolve("infer", compose("infer", ["logger=none"]), [])
    tokenizer = load_tokenizer(config["model"])
    counts = []
    for question in load_questions("mt_bench"):
        first = [{"role": "user", "content": question.turns[0]}]
        answered = [*first, {"role": "assistant", "content": ""}, {"role": "user", "content": question.turns[1]}]
        one = len(prompt_ids(tokenizer, first))
        counts.append([one, len(prompt_ids(tokenizer, answered)) - one])
    about = "tokens of MT-bench's first turns, and of what second turns add beside answers; SmolLM2's tokenizer"
    PROMPTS.write_text(json.dumps({"about": about, "tokens": counts}) + "\n")


def count_answers(file: Path) -> None:
    """Write LENGTHS: the new tokens of both answers to each question, as a run's answers.jsonl counted them."""
    from llm_at_home.records.jsonl import read_jsonl

    answers = sorted(read_jsonl(file), key=lambda answer: int(answer["question_id"]))
    lines = [f" {json.dumps(answer['generated_tokens'])}" for answer in answers]
    LENGTHS.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def main() -> int:
    if sys.argv[1:] == ["--count-prompts"]:
        count_prompts()
        return 0
    if sys.argv[1:2] == ["--count-answers"] and len(sys.argv) == 3:
        count_answers(Path(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=80)
    parser.add_argument("--tokens", type=int, default=1024, help="new tokens of a turn (default: %(default)s)")
    parser.add_argument("--lengths", type=Path, help="new tokens of each turn instead")
    parser.add_argument("--places", type=int, default=PLACES, help="sequences at once, at most (default: %(default)s)")
    parser.add_argument("--sample", type=int, default=128, help="new tokens of each of the reference's three answers")
    return common.run_methods(parser, ["none", "gptq"], measure, table, rows)


if __name__ == "__main__":
    sys.exit(main())
