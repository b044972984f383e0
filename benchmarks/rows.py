"""What the tables' scripts share: a row is one run of an entry point, kept when it has a result, and resumable."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.records import store
from llm_at_home.records.schema import Reading, Record
from llm_at_home.reporting import facts

ROOT = Path(__file__).resolve().parent.parent
DONE = ("ok", "out_of_memory")
DASH = "–"


def run_row(name: str, command: Sequence[str], out: Path, headline: Sequence[str], keep: Sequence[str] = ()) -> str:
    """Run one row, keep its record below ``out``, and say in a line how it went.

    Args:
        name: of the row, and of its folder.
        command: script and overrides.
        out: where rows are kept.
        headline: the figures to show.
        keep: further files of the run folder that are kept.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="row_") as folder:
        words = [sys.executable, *command, "rerun=true", f"hydra.run.dir={folder}"]
        done = _ended_with_us(words)
        seconds = time.monotonic() - start
        try:
            record = store.load(folder)
        except Refusal:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            return f"{name}: no record after {seconds:.0f} s: {said[-1] if said else f'exit code {done.returncode}'}"
        store.save(record, out / name)
        for file in keep:
            if (Path(folder) / file).is_file():
                (out / name / file).write_bytes((Path(folder) / file).read_bytes())
    figures = {**record.readings, **record.quality}
    shown = ", ".join(f"{text(figures[key], 3)} {figures[key].unit}" for key in headline if has(record, key))
    error = facts.error_line(record)
    return f"{name}: {record.status} in {seconds:.0f} s  {shown}{'  ' + error if error else ''}"


def _ended_with_us(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command that a SIGTERM to this process ends too: what went on would share the card with the next row."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            said, complained = process.communicate()
        except BaseException:
            process.terminate()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    return subprocess.CompletedProcess(words, process.returncode, said, complained)


def run_rows(
    rows: Iterable[tuple[str, Sequence[str]]],
    out: Path,
    minutes: float,
    headline: Sequence[str],
    keep: Sequence[str] = (),
) -> int:
    """Run every row that is not there yet, until the time is up; 1 when one left no usable record.

    Args:
        rows: name and command of each, in the order of running.
        out: where rows are kept.
        minutes: no row is started after so many.
        headline: the figures to show.
        keep: further files of each run folder that are kept.
    """
    deadline = time.monotonic() + minutes * 60
    failed = False
    for name, command in rows:
        if status(out / name) in DONE:
            print(f"{name}: is there")
            continue
        if time.monotonic() > deadline:
            print(f"{minutes:g} minutes are up: the same command goes on with {name}")
            break
        print(run_row(name, command, out, headline, keep), flush=True)
        failed |= status(out / name) not in DONE
    return int(failed)


def run_choices(
    description: str | None,
    protocol: Sequence[str],
    choices: Mapping[str, Sequence[str]],
    default: Iterable[str],
    headline: Sequence[str],
    table: Callable[[Path], str],
) -> int:
    """A script whose rows are one command with one choice each, with its options.

    Args:
        description: the script's docstring.
        protocol: entry point and overrides of every row.
        choices: each row's further overrides.
        default: rows that run where none are named.
        headline: the figures to show.
        table: a folder as Markdown.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="measure, and keep each row's record below this folder")
    what.add_argument("--table", type=Path, metavar="FOLDER", help="print the table of the records in this folder")
    parser.add_argument("--rows", nargs="+", choices=choices, default=list(default), metavar="ROW")
    parser.add_argument("--minutes", type=float, default=60, help="start nothing after so many (default: %(default)s)")
    parser.add_argument("--fill", type=float, metavar="GB", help="so much of the GPU's memory is taken meanwhile")
    parser.add_argument("overrides", nargs="*", help="after --: overrides for every run, such as gpu=cpu")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return 0
    commands = [(name, [*protocol, *choices[name], *args.overrides]) for name in args.rows]
    if args.fill:
        import torch

        if not torch.cuda.is_available():
            parser.error("--fill takes a GPU's memory, and there is none: leave it out")
        taken = torch.empty(int(args.fill * 1e9), dtype=torch.uint8, device="cuda")
        print(f"{taken.nbytes / 1e9:.1f} GB of the GPU's memory are taken")
    return run_rows(commands, args.out, args.minutes, headline)


def ratio(above: Record | None, below: Record | None, key: str) -> str:
    """One record's figure over another's, or a dash where one is unknown or there is no record."""
    values = [r.readings[key].value if r is not None and key in r.readings else None for r in (above, below)]
    return DASH if None in values or not values[1] else f"{values[0] / values[1]:.2f}"  # type: ignore[operator]


def beside(reference: Record | None, record: Record) -> Record | None:
    """The reference, where it ran on the record's machine: two hosts with one kind of card differ by half."""
    return reference if reference and facts.machine(reference) == facts.machine(record) else None


def status(folder: Path) -> str | None:
    """The status of the record in a row's folder, or None where there is none."""
    return store.load(folder).status if (folder / store.RECORD).is_file() else None


def has(record: Record, key: str) -> bool:
    """Whether a record knows a figure."""
    reading = record.readings.get(key) or record.quality.get(key)
    return reading is not None and reading.value is not None


def text(reading: Reading | None, digits: int) -> str:
    """A figure's value, or a dash where it is unknown."""
    return DASH if reading is None or reading.value is None else f"{reading.value:,.{digits}f}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first line its titles."""
    titles, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *rest))


def number(value: float | None, digits: int) -> str:
    """A figure of a result file, or a dash where it is unknown."""
    return DASH if value is None else f"{value:,.{digits}f}"


# The bases that fast decoding is measured on; GPTQ and AWQ as the checkpoints on the hub have them.
DECODED = {
    "none": ["quant=none"],
    "nf4": ["quant=nf4"],
    "gptq": ["quant=gptq", "quant.group_size=128"],
    "awq": ["quant=awq", "quant.group_size=128"],
    "int8": ["quant=int8"],
}


def load_decoded(args: argparse.Namespace, method: str) -> tuple[dict[str, Any], Any]:
    """The resolved configuration and the base of one of ``DECODED``; random weights but for the embedded model."""
    from hydra import compose, initialize_config_dir

    from llm_at_home.quantization.base import load_base
    from llm_at_home.tasks import resolve

    words = [f"model={args.model}", "questions=synthetic", "logger=none", *DECODED[method], *args.overrides]
    if args.model != "smollm2_135m":
        words.append("model.weights=random")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = resolve.resolve("infer", compose("infer", words), words)
    resolve.check("infer", config)
    return config, load_base(config)


def run_methods(
    parser: argparse.ArgumentParser,
    methods: Sequence[str],
    measure: Callable[[argparse.Namespace, str], Mapping[str, Any]],
    table: Callable[[Path], str],
    rows: Callable[[Sequence[dict[str, Any]]], list[dict[str, Any]]],
) -> int:
    """A script that measures methods, each in a process of its own, into ``OUT/METHOD.json`` and ``OUT/rows.json``.

    Args:
        parser: of the script's own options; those for methods, files and overrides are added here.
        methods: by default.
        measure: one method, in the process that is there; may write its file earlier itself.
        table: a folder as Markdown.
        rows: what ``rows.json`` holds, of the results.
    """
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="measure, a file a method into this folder, and rows.json")
    what.add_argument("--table", type=Path, metavar="FOLDER", help="print the table of such a folder")
    parser.add_argument("--model", default="llama2_7b")
    parser.add_argument("--methods", nargs="+", choices=DECODED, default=methods)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="after --: overrides")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    if args.one:
        write(measure(args, args.one), args.out / f"{args.one}.json")
        return 0
    words = sys.argv[1:]
    place = words.index("--") if "--" in words else len(words)
    failed = False
    for method in args.methods:
        if (args.out / f"{method}.json").is_file():
            print(f"{method}: is there")
            continue
        command = [sys.executable, sys.argv[0], *words[:place], "--one", method, *words[place:]]
        failed |= bool(subprocess.run(command).returncode)
    write({"rows": rows(stored(args.out))}, args.out / "rows.json")
    print(table(args.out))
    return int(failed)


def stored(folder: Path, names: Iterable[str] = DECODED) -> list[dict[str, Any]]:
    """The results of a folder, in the order of the names."""
    files = [folder / f"{name}.json" for name in names]
    return [json.loads(file.read_text()) for file in files if file.is_file()]


def write(result: Mapping[str, Any], file: Path) -> None:
    """Write a result file."""
    file.write_text(json.dumps(result, indent=1) + "\n")


@contextmanager
def bare(base: Any) -> Iterator[None]:
    """Whatever a row puts on a base is taken off again: adapters, compiled code, recomputing, gradients."""
    modules = {name: module for name, module in base.named_modules() if name}
    trained = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    training = base.training
    try:
        yield
    finally:
        for name, module in modules.items():
            parent, _, last = name.rpartition(".")
            setattr(modules[parent] if parent else base, last, module)
            module._compiled_call_impl = None
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
        if hasattr(base, "peft_config"):
            del base.peft_config
        for name, parameter in base.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(trained[name])
        base.train(training)


def read_in_a_step(model: Any) -> tuple[float, float]:
    """Bytes that a step of decoding reads: all weights but the embedding, and the cache for each token that is seen."""
    from llm_at_home.quantization.size import size_readings

    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    embedding = model.get_input_embeddings().weight
    weights = (size_readings(model)["model_size"].value or 0) * 1e9
    if model.get_output_embeddings().weight.data_ptr() != embedding.data_ptr():
        weights -= embedding.numel() * embedding.element_size()
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * size
    return weights, float(values * embedding.element_size())


def copy_bandwidth(device: str) -> float | None:
    """Bytes a second that a copy reads and writes on the GPU, the best of twenty; None on a CPU.

    It copies 1 GiB, or 256 MiB where memory is short.
    """
    if device != "cuda":
        return None
    import torch

    size = 2**30
    try:
        source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    except torch.OutOfMemoryError:
        size = 2**28
        source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    best = 0.0
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        best = max(best, 2 * size / (begin.elapsed_time(end) / 1000))
    del source, target
    torch.cuda.empty_cache()
    return best
