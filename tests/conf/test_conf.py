"""Every shipped choice composes, and every ``_target_`` in it is a class that takes these arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from llm_at_home.adapters.attach import OWN_KEYS, rank_schedule
from llm_at_home.tasks import fast, planned, resolve

CONF = Path(__file__).resolve().parents[2] / "conf"
COMMANDS = ("train", "infer", "evaluate", "quantize", "prune", "merge")
NO_GROUP = ("hydra",)
PAPER = OmegaConf.load(CONF / "paper.yaml")
# Each experiment and its command.
EXPERIMENTS = {
    **{f"paper/{row}": "infer" for row in ("inference", PAPER.stock, *PAPER.inference)},
    **{f"paper/{row}": "train" for row in ("finetuning", *PAPER.finetuning)},
    **{f"paper/{row}": "evaluate" for row in PAPER.judging},
    "small/inference": "infer",
    "small/finetuning": "train",
    "small/judging": "evaluate",
    "handbook": "train",
    "demo": "infer",
    "table1": "infer",
    "table3": "train",
    "methods": "infer",
    "fidelity": "evaluate",
}
# What a choice cannot do without.
REQUIRED = {
    "model/custom": ["model.source=some/model"],
    "data/jsonl": ["data.path=here.jsonl"],
    "trainer/fast": ["trainer.micro_batch=null"],  # the planner knows GPUs alone
    "merge": ["adapter_path=some/run", "out=some/folder"],
}


def composed(command: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(command, list(overrides))


def choices() -> list[tuple[str, str, str]]:
    found = []
    for command in COMMANDS:
        text = (CONF / f"{command}.yaml").read_text()
        for folder in sorted(p for p in CONF.iterdir() if p.is_dir() and p.name not in NO_GROUP):
            if f"- {folder.name}:" in text and folder.name != "experiment":
                found += [(command, folder.name, file.stem) for file in sorted(folder.glob("*.yaml"))]
    return found + [(command, "experiment", name) for name, command in EXPERIMENTS.items()]


@pytest.mark.parametrize(("command", "group", "choice"), choices())
def test_every_choice_composes_and_resolves(command, group, choice):
    config = composed(
        command,
        f"{group}={choice}",
        *REQUIRED.get(f"{group}/{choice}", []),
        *REQUIRED.get(command, []),
        "gpu.device=cpu",
    )
    resolved = resolve.resolve(command, config)
    assert "auto" not in (resolved.get("dtype"), resolved["gpu"]["device"])


def test_every_experiment_is_tested():
    folder = CONF / "experiment"
    assert {str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml")} == set(EXPERIMENTS)


def targets() -> list[tuple[Path, str]]:
    found = []
    for path in sorted(CONF.rglob("*.yaml")):
        config = OmegaConf.load(path)
        found += [(path, key) for key in paths_to_targets(config)]
    return found


def paths_to_targets(node, prefix=""):
    if not isinstance(node, DictConfig):
        return
    if "_target_" in node:
        yield prefix
    for key in node:
        if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
            yield from paths_to_targets(node[key], f"{prefix}.{key}" if prefix else str(key))


@pytest.mark.parametrize(("path", "key"), targets(), ids=lambda value: getattr(value, "name", value or "top"))
def test_every_target_is_real_and_takes_its_arguments(path, key):
    config = OmegaConf.load(path)
    node = OmegaConf.select(config, key) if key else config
    own = (*OWN_KEYS, *fast.OWN_KEYS, planned.KEY, "defaults")
    keys = [key for key in node if key not in own and not OmegaConf.is_interpolation(node, key)]
    values = {key: node[key] for key in keys}
    if "schedule" in node:
        values |= rank_schedule(node["schedule"], 100)  # which is counted when the run's steps are known
    if path.parent.name in ("engine", "optimizer", "scheduler", "trainer"):
        values["_partial_"] = True  # they need a model, parameters or a run folder
    made = instantiate(OmegaConf.create(values))
    assert made is not None
    if values.get("_partial_"):
        import inspect

        inspect.signature(made.func).bind_partial(**made.keywords)


def test_the_defaults_are_the_paper_s_protocol():
    config = composed("train")
    assert config.optimizer.lr == 1e-4
    assert config.optimizer.weight_decay == 0.0
    assert config.data.batch_size == 1
    assert config.data.max_length == 400
    assert config.callbacks.accumulation.steps == 8
    assert config.callbacks.clipping.max_norm == 0.3
    assert (config.adapter.r, config.adapter.lora_alpha, config.adapter.lora_dropout) == (64, 16, 0.0)
    assert config.adapter.target_modules == "all-linear"


def test_every_file_says_what_it_is():
    for path in CONF.rglob("*.yaml"):
        if path.parent.name != "help":
            assert "# " in path.read_text().split("\n\n")[0][:400], f"{path} has no comment"


def test_a_source_on_the_command_line_is_another_model():
    config = composed("infer", "model.source=some/other-model")
    resolved = resolve.resolve("infer", config, ["model.source=some/other-model"])
    assert resolved["model"]["name"] == "other-model"
    assert resolved["model"]["architecture"] is None


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "32-true"), ("bfloat16", "bf16-mixed")])
def test_precision_follows_dtype(dtype, precision):
    resolved = resolve.resolve("train", composed("train", f"dtype={dtype}", "gpu=cpu"))
    assert resolved["trainer"]["precision"] == precision


def test_an_evaluation_s_record_names_no_model_that_it_does_not_use():
    judged = resolve.resolve("evaluate", composed("evaluate", "gpu=cpu"))
    assert not {"model", "quant", "data", "engine"} & set(judged)
    scored = resolve.resolve("evaluate", composed("evaluate", "task=text", "gpu=cpu"))
    assert "judge" not in scored


def test_an_experiment_has_the_last_word_and_the_command_line_a_later_one():
    assert composed("evaluate", "experiment=fidelity").task == "fidelity"
    assert composed("evaluate", "experiment=fidelity", "task=text").task == "text"
    assert composed("train", "experiment=handbook", "adapter.r=8").adapter.r == 8
