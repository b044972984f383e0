"""LoKr with its factors against PEFT's LoKr and LyCORIS's, in one run; LoRA of as many parameters is the reference.

    python benchmarks/lokr.py --out results/h100/lokr                       # Llama-2-7B's shape, random weights
    python benchmarks/lokr.py --out FILE_FOLDER --model smollm2_135m -- gpu=cpu

Each contender trains the same base in the same process, one after the other, in the opposite order in the next round:
forward, backward and AdamW on 8 micro-batches of 1 x 400 tokens a step, under autocast to the base's dtype. A figure is
a ratio to LoRA's in the same run: median seconds a step, and the peak of torch's allocated memory (on a GPU; null
elsewhere). LyCORIS is the extra ``comparisons``; where it is not installed its row says so. The file is written after
each contender: a run that is cut off keeps what it has.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import rows as common

from llm_at_home.records.provenance import collect

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LOKR = {"name": "lokr", "trains": "adapter", "_target_": "peft.LoKrConfig", "task_type": "CAUSAL_LM"}
LOKR |= {"r": 128, "alpha": 32, "decompose_factor": 2, "target_modules": "all-linear"}
CONTENDERS: dict[str, dict[str, Any]] = {
    "LoRA, rank 64": {
        "name": "lora",
        "trains": "adapter",
        "_target_": "peft.LoraConfig",
        "task_type": "CAUSAL_LM",
        "r": 64,
        "lora_alpha": 16,
        "target_modules": "all-linear",
    },
    "LoKr, factored": LOKR,
    "LoKr, PEFT": {**LOKR, "implementation": "peft"},
    "LoKr, LyCORIS": {**LOKR, "implementation": "lycoris"},
    "LoKr, LyCORIS bypass": {**LOKR, "implementation": "lycoris", "bypass": True},
    "LoKr near the square root, factored": {**LOKR, "decompose_factor": -1, "r": 64},
    "LoKr near the square root, PEFT": {**LOKR, "decompose_factor": -1, "r": 64, "implementation": "peft"},
}
REFERENCE = "LoRA, rank 64"


class Contender:
    """An adapter on the base, with its optimizer.

    Args:
        base: the model, without an adapter.
        adapter: an ``adapter`` group.
    """

    def __init__(self, base: Any, adapter: dict[str, Any]) -> None:
        import torch

        from llm_at_home.adapters.attach import prepare_for_training

        self.base, self.network, self.wrapped = base, None, None
        if adapter.get("implementation") == "lycoris":
            base.requires_grad_(False)
            self.network = lycoris(base, adapter)
            self.model = base.train()
            self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        else:
            self.model = prepare_for_training(base, adapter)
            self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0)

    def step(self, batches: Any, device: str, dtype: Any) -> None:
        """One optimizer step over the micro-batches."""
        import torch

        for ids in batches:
            with torch.autocast(device, dtype=dtype, enabled=dtype is not torch.float32):
                loss = self.model(input_ids=ids, labels=ids).loss
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 0.3)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def release(self) -> None:
        """Take the adapter off the base, and let go of it and its optimizer, whoever keeps this object.

        PEFT imports gptqmodel when it first attaches LoRA to a dense layer, and that import keeps its callers' frames.
        """
        if self.network is not None:
            self.network.restore()
        else:
            self.model.unload()
        vars(self).clear()


def lycoris(base: Any, adapter: dict[str, Any]) -> Any:
    """LyCORIS's LoKr of the same shape on the same layers; its bypass mode computes with the factors."""
    import torch
    from lycoris import LycorisNetwork, create_lycoris

    LycorisNetwork.apply_preset({"enable_conv": False, "target_module": [], "target_name": [f".*{t}" for t in TARGETS]})
    network = create_lycoris(
        base,
        1.0,
        linear_dim=adapter["r"],
        linear_alpha=adapter["alpha"],
        algo="lokr",
        factor=adapter["decompose_factor"],
        bypass_mode=adapter.get("bypass", False),
    )
    network.apply_to()
    device = next(base.parameters()).device
    return network.to(device=device, dtype=torch.float32).requires_grad_(True).train()


def measure(base: Any, adapter: dict[str, Any], batches: Any, device: str, dtype: Any, steps: int) -> dict[str, Any]:
    """Seconds of each step after a warm one, peak memory, and the number of trained parameters."""
    import torch

    from llm_at_home.metering.timing import now

    contender = Contender(base, adapter)
    try:
        contender.step(batches, device, dtype)
        seconds = []
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            start = now(device)
            contender.step(batches, device, dtype)
            seconds.append(now(device) - start)
        peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
        return {"seconds": seconds, "peak": peak, "parameters": sum(p.numel() for p in contender.parameters)}
    finally:
        contender.release()
        del contender
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All contenders, in rounds of alternating order; the result is in the file as well."""
    import torch
    from hydra import compose, initialize_config_dir

    from llm_at_home.quantization.base import load_base
    from llm_at_home.tasks import resolve

    words = [f"model={args.model}", "data=synthetic", "logger=none", *args.overrides]
    if args.model != "smollm2_135m":
        words.append("model.weights=random")
    with initialize_config_dir(str(common.ROOT / "conf"), version_base="1.3"):
        config = resolve.resolve("train", compose("train", words), words)
    device, dtype = config["gpu"]["device"], getattr(torch, config["dtype"])
    base = load_base(config)
    torch.manual_seed(0)
    batches = torch.randint(0, base.config.vocab_size, (args.micro_batches, 1, args.tokens), device=device)
    found: dict[str, Any] = {name: {"seconds": [], "peak": None} for name in args.contenders}
    protocol = {key: getattr(args, key) for key in ("model", "tokens", "micro_batches", "rounds", "steps")}
    protocol |= {"quant": config["quant"]["name"], "dtype": config["dtype"]}
    result = {"protocol": protocol, "provenance": collect(), "contenders": found}
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"lokr_{protocol['quant']}_{protocol['dtype']}.json"
    for turn in range(args.rounds):
        for name in args.contenders if turn % 2 == 0 else reversed(args.contenders):
            try:
                one = measure(base, CONTENDERS[name], batches, device, dtype, args.steps)
            except ImportError as error:
                found[name]["reason"] = f"not installed: {error.name}"
                continue
            except torch.cuda.OutOfMemoryError:
                found[name]["reason"] = "out of memory"
                continue
            found[name]["seconds"] += one["seconds"]
            found[name] |= {key: one[key] for key in ("peak", "parameters")}
            file.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name}: {statistics.median(one['seconds']):.3f} s/step, peak {one['peak']} GB", flush=True)
    file.write_text(json.dumps(result, indent=1) + "\n")  # with the reasons of those that could not run
    return result


def table(result: dict[str, Any]) -> str:
    """The contenders as Markdown, ratios to LoRA's."""
    rows = result["contenders"]
    reference = rows[REFERENCE]
    pace = statistics.median(reference["seconds"])
    lines = [["adapter", "parameters", "s/step, median", "time / LoRA's", "peak (GB)", "peak / LoRA's"]]
    for name, row in rows.items():
        if not row["seconds"]:
            lines.append([name, *[common.DASH] * 4, row.get("reason", common.DASH)])
            continue
        median = statistics.median(row["seconds"])
        peaks = [common.DASH] * 2
        if row["peak"] and reference["peak"]:
            peaks = [f"{row['peak']:.2f}", f"{row['peak'] / reference['peak']:.3f}"]
        lines.append([name, f"{row['parameters']:,}", f"{median:.3f}", f"{median / pace:.3f}", *peaks])
    return common.markdown(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="measure, and write lokr_QUANT_DTYPE.json into this folder")
    what.add_argument("--table", type=Path, metavar="FILE", help="print the table of such a file")
    parser.add_argument("--model", default="llama2_7b")
    parser.add_argument("--tokens", type=int, default=400, help="of a micro-batch (default: %(default)s, the paper's)")
    parser.add_argument("--micro-batches", type=int, default=8, help="in a step (default: %(default)s, the paper's)")
    parser.add_argument("--steps", type=int, default=4, help="timed, of each contender in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("overrides", nargs="*", help="after --: overrides such as quant=nf4")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return 0
    print(table(run(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
