"""The runs of the paper in their order: inference, fine-tuning, the fine-tuned models' answers, and judging."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from llm_at_home.errors import Refusal
from llm_at_home.hardware.device import resolve_device
from llm_at_home.models.source import EMBEDDED
from llm_at_home.reporting import published
from llm_at_home.tasks.paper.options import Options, composed

PAPER, RESOURCES, SMALL = "paper", "resources", "small"
INFERENCE, FINETUNING, ANSWERS, SINGLE, PAIRWISE = "inference", "finetuning", "answers", "single", "pairwise"
NO_JUDGE = "judging with GPT-4 costs money: add judge=gpt4 with OPENAI_API_KEY set, or judge=server judge.model=NAME"
NOT_FULL = "fine-tuned for fewer steps than the paper's: full=true answers and judges with the whole"


@dataclass(frozen=True)
class Run:
    """One run of an entry point.

    Attributes:
        name: of its folder.
        row: the row of the paper that it belongs to, a name of ``conf/experiment/paper``.
        kind: inference, finetuning, answers (of a fine-tuned model), single or pairwise.
        task: train, infer or evaluate.
        words: its overrides.
        needs: names of runs that must have ended well before.
        baselines: names of runs of which the first that ended well is ``baseline=``.
        left_out: why it is not run, where that is known from the options alone.
    """

    name: str
    row: str
    kind: str
    task: str
    words: tuple[str, ...]
    folder: Path
    needs: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    left_out: str | None = None

    def command(self, words: Sequence[str]) -> str:
        """What a user would type for it."""
        quoted = [f"'{word}'" if set(word) & set("[]{}, ") else word for word in words]
        return " ".join(["python", f"{self.task}.py", *quoted, f"hydra.run.dir={self.folder}"])


def runs(options: Options) -> list[Run]:
    """All runs that the options name.

    Raises:
        Refusal: for overrides that no run takes.
    """
    return _Builder(options).runs()


def protocol_of(options: Options) -> str:
    """``protocol=``, or for auto what fits the model: its weights decide, and where there is no GPU the time."""
    if options.protocol != "auto":
        return str(options.protocol)
    if options.named("model.weights") == "random":
        return RESOURCES
    config = composed("infer", [word for word in options.overrides if word.split("=")[0] in ("model", "gpu")])
    on_cpu = resolve_device(dict(config.gpu))["device"] == "cpu"
    embedded = options.named("model") is not None and config.model.get("source") == EMBEDDED
    return SMALL if embedded or on_cpu else PAPER


def group_of(word: str) -> str:
    """The first part of an override's key."""
    return word.lstrip("+~").partition("=")[0].partition(".")[0]


class _Builder:
    def __init__(self, options: Options) -> None:
        self.options = options
        self.protocol = protocol_of(options)
        model = options.named("model") or "llama2"
        self.out = Path(options.out or Path(options.paths["output"]) / "paper" / f"{model}_{self.protocol}")
        self.keys = {task: set(composed(task, [])) for task in ("infer", "train", "evaluate")}
        taken = {word for task in self.keys for word in self._own(task)}
        for word in options.overrides:
            if word not in taken:
                raise Refusal(f"{word}: no run has such a key")

    def runs(self) -> list[Run]:
        wanted = self.options.rows
        inference = [row for row in self.options.inference if wanted is None or row in wanted]
        finetuning = [row for row in self.options.finetuning if wanted is None or row in wanted]
        found = [self._run(row, row, INFERENCE, "infer", self._words("infer", row)) for row in inference]
        found += [self._run(row, row, FINETUNING, "train", self._training(row)) for row in finetuning]
        if self.protocol == RESOURCES:
            return found
        answers = [*self._answers(finetuning)]
        return [*found, *answers, *self._judging(inference, answers)]

    def _run(self, name: str, row: str, kind: str, task: str, words: tuple[str, ...], **more: Any) -> Run:
        return Run(name, row, kind, task, words, self.out / name, **more)

    def _own(self, task: str) -> list[str]:
        """The user's overrides that a task has the key of."""
        return [word for word in self.options.overrides if group_of(word) in self.keys[task]]

    def _words(self, task: str, row: str) -> tuple[str, ...]:
        protocol = self.options.protocols[self.protocol]
        second = protocol[task]
        experiment = f"experiment=[paper/{row},{second}]" if second else f"experiment=paper/{row}"
        words = [experiment, *self._source(task, row), *self._own(task)]
        if task == "infer" and protocol["calibrated"]:
            config = _tried(task, words)
            if config is not None and "calibration" in config.quant:
                words[1:1] = protocol["calibrated"]
        if self.options.paths["output"] != "multirun":
            words.append(f"paths.output={self.options.paths['output']}")
        return tuple(words)

    def _source(self, task: str, row: str) -> list[str]:
        """Where the user has the paper's weights: the base's, which is fine-tuned, or the chat model's."""
        is_base = task == "train" or row == self.options.stock
        where = self.options.base_source if is_base else self.options.chat_source
        return [f"model.source={where}"] if where and task != "evaluate" else []

    def _training(self, row: str) -> tuple[str, ...]:
        full = (f"trainer.max_steps={published.table3()['steps']}",) if self.options.full else ()
        return (*self._words("train", row), *full)

    def _answers(self, finetuning: Sequence[str]) -> Iterator[Run]:
        """The base model's answers and each fine-tuned model's, on the base that it was trained on."""
        if not finetuning:
            return
        left_out = NOT_FULL if self.protocol == PAPER and not self.options.full else None
        words, stock = self._words("infer", self.options.stock), self.options.stock
        yield self._run(stock, stock, ANSWERS, "infer", words)
        for row in finetuning:
            base = _tried("train", self._words("train", row))
            quantized = () if base is None else (f"quant={base.quant.name}", f"dtype={base.dtype}")
            adapter = (*quantized, f"adapter_path={self.out / row}")
            name = f"{row}_{ANSWERS}"
            yield self._run(name, row, ANSWERS, "infer", (*words, *adapter), needs=(row,), left_out=left_out)

    def _judging(self, inference: Sequence[str], answers: Sequence[Run]) -> Iterator[Run]:
        left_out = None
        judge: tuple[str, ...] = ()
        if self.options.judge != "auto":
            judge = (f"judge={self.options.judge}",)
        elif self.protocol == PAPER:
            left_out = NO_JUDGE
        stock = self.options.stock
        compared: list[tuple[str, str, str | None, tuple[str, ...]]] = []
        for row in inference:
            before = [name for name in self.options.baselines if name in inference and name != row]
            if row in self.options.baselines:
                before = before[: self.options.baselines.index(row)]
            compared.append((row, row, None, tuple(before)))
        compared += [(run.name, run.row, run.left_out, () if run.name == stock else (stock,)) for run in answers]
        for kind, experiment in zip((SINGLE, PAIRWISE), self.options.judging, strict=True):
            words = (*self._words("evaluate", experiment), *judge)
            for answered, row, why, baselines in compared:
                if kind == PAIRWISE and not baselines:
                    continue
                yield self._run(
                    f"{answered}_{kind}",
                    row,
                    kind,
                    "evaluate",
                    (*words, f"answers={self.out / answered}"),
                    needs=(answered,),
                    baselines=baselines if kind == PAIRWISE else (),
                    left_out=why or left_out,
                )


def _tried(task: str, words: Sequence[str]) -> DictConfig | None:
    """A run's configuration, or None where it is refused, which is told at its turn."""
    try:
        return composed(task, words)
    except Refusal:
        return None


def baseline_words(run: Run, folders: Mapping[str, Path], ended_well: Sequence[str]) -> tuple[str, ...]:
    """``baseline=`` of a pairwise run: the first of its baselines that ended well, or nothing."""
    found = [name for name in run.baselines if name in ended_well]
    return (f"baseline={folders[found[0]]}",) if found else ()
