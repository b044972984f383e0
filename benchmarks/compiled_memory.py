"""What decoder layers keep between the forward and the backward pass: recomputed, compiled, and both, on the CPU.

    python benchmarks/compiled_memory.py            # a table for the torch that is installed; a minute or two

A Llama of 12 layers with LoRA of rank 8, 4 conversations of 512 random tokens. ``kept`` is how much more memory the
process holds after the forward pass, ``peak`` how much more at most until the backward pass is over, both in the third
of three passes and above what it held before it. A row is a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import subprocess
import sys
from pathlib import Path

SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12, "num_attention_heads": 4}
RECOMPUTED, COMPILED, NF4 = "recomputed", "compiled", "nf4"
ROWS = ((), (RECOMPUTED,), (COMPILED,), (RECOMPUTED, COMPILED), (NF4, RECOMPUTED), (NF4, RECOMPUTED, COMPILED))
CLEAR_PEAK = "5"  # for /proc/self/clear_refs


def held(name: str) -> float:
    """Memory of this process in MB, by its name in /proc/self/status; what is free is given back first."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1e3


def row(words: list[str]) -> None:
    """Three passes of one kind of layers, in this process."""
    import bitsandbytes
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_layers import GradientCheckpointingLayer

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=512, **SIZES)).to(torch.bfloat16).requires_grad_(False)
    for layer in base.model.layers if NF4 in words else ():
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    shape = (linear.in_features, linear.out_features)
                    # Without its dtype the layer finds it out in its first pass, which cuts a graph.
                    made = bitsandbytes.nn.Linear4bit(*shape, bias=False, compute_dtype=torch.bfloat16)
                    made.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                    setattr(parent, name, made.to("cpu"))
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear"))
    base.config.use_cache = False
    if RECOMPUTED in words:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    for module in model.modules():
        if COMPILED in words and isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=False)
    ids = torch.randint(0, 512, (4, 512))
    for _ in range(3):
        before = held("VmRSS")
        Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = base.model(input_ids=ids).last_hidden_state
        kept = held("VmRSS") - before
        hidden.float().sum().backward()
        peak = held("VmHWM") - before
        del hidden
    print(f"| {torch.__version__} | {', '.join(words) or 'as they are'} | {kept:.0f} | {peak:.0f} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row is not None:
        row(args.row)
        return 0
    print("| torch | layers | kept (MB) | peak (MB) |\n| --- | --- | --- | --- |", flush=True)
    failed = 0
    for words in ROWS:
        done = subprocess.run([sys.executable, sys.argv[0], "--row", *words], capture_output=True, text=True)
        if done.returncode:
            print(f"{', '.join(words)}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            failed = 1
        else:
            print(done.stdout.splitlines()[-1], flush=True)  # libraries may greet before
    return failed


if __name__ == "__main__":
    sys.exit(main())
