"""The planner against peaks that were measured on an H100, on configurations that its constants were not fitted to."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llm_at_home.planning.activations import loss_memory
from llm_at_home.planning.allocator import constants
from llm_at_home.planning.inference import predict_inference
from llm_at_home.planning.shape import Shape
from llm_at_home.planning.training import batch_of, predict_training
from llm_at_home.records import store

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results" / "h100"
DOCS = ROOT / "docs"
CHOICES = ("training_memory", "training_memory_nf4", "training_memory_full")
HELD_OUT = ("planner", "table1_second_host", "table1_third_host", *CHOICES)
ERROR = 0.05
# What was read off a record, or put right because of it, says nothing by being right there; docs/planner.md says what
# is known of the other.
READ_OFF = [
    *("planner/int8_lora_b1_500", "planner/int8_lora_b4_1024_full", "planner/mistral_infer_b16_1000"),
    *("planner/none_infer_b16_500", "planner/none_infer_b4_1000", "planner/nf4_loha_b1_500"),
    *("training_memory/one_batch", "training_memory/loss_tokens_256", "training_memory/loss_liger"),
    "training_memory_full/full_paged_adamw_8bit",
]
PUT_RIGHT = [
    "planner/nf4_loha_b1_500",
    "planner/nested_smallest_400",
    "training_memory/checkpointing_full",
    *READ_OFF[-4:],
]
FURTHER_OFF = {"planner/limit_24gb_mistral_7b_32000": 0.08}
PEAKS = {"reserved": "torch_reserved_peak", "process": "process_memory_peak"}


def essence(record):
    """What of a configuration decides its memory."""
    config = record.config
    groups = [config.get(group) for group in ("model", "quant", "adapter", "optimizer", "dtype")]
    memory = config.get("memory") or {"checkpointing": "none", "offload": False, "loss_tokens": None}
    sizes = [config.get("data", {}).get(key) for key in ("batch_size", "max_length")]
    engine, questions = config.get("engine", {}), config.get("questions", {})
    return [record.task, *groups, memory, *sizes, engine.get("batch_size"), questions.get("prompt_tokens")]


def held_out():
    """Records of configurations that no constant was fitted to, by their places, each configuration once."""
    folders = [ROOT / folder for folder in constants()["fitted_to"].values()]
    seen = [essence(store.load(path.parent)) for folder in folders for path in folder.glob("*/record.json")]
    found = {}
    for path in sorted(path for folder in HELD_OUT for path in (RESULTS / folder).glob("*/record.json")):
        record = store.load(path.parent)
        if record.status == "ok" and essence(record) not in seen:
            seen.append(essence(record))
            found[f"{path.parent.parent.name}/{path.parent.name}"] = record
    return found


RECORDS = held_out()


def predict(record):
    if record.task == "train":
        return predict_training(record.config)
    return predict_inference(record.config, record.config["questions"]["prompt_tokens"])


@pytest.mark.parametrize("row", RECORDS)
def test_the_predicted_peaks_are_within_five_per_cent(row):
    prediction = predict(RECORDS[row])
    for name, key in PEAKS.items():
        measured = RECORDS[row].readings[key].value
        assert getattr(prediction, name) / 1e9 == pytest.approx(measured, rel=FURTHER_OFF.get(row, ERROR)), key


@pytest.mark.parametrize("row", PUT_RIGHT)
def test_the_tensors_of_what_was_put_right_are_counted(row):
    measured = RECORDS[row].readings["torch_allocated_peak"].value
    assert predict(RECORDS[row]).allocated / 1e9 == pytest.approx(measured, rel=0.003)


def test_no_gradients_wait_in_a_step_of_one_micro_batch_but_a_graph_s(plain):
    for graph, waiting in (("off", False), ("auto", True)):
        config = plain("train", "callbacks.accumulation.steps=1", f"trainer.graph={graph}")
        assert (predict_training(config).parts["gradients"] > 0) == waiting
    assert predict_training(plain("train", "callbacks.accumulation.steps=2")).parts["gradients"] > 0


def test_liger_s_logits_take_what_the_hidden_states_do(plain):
    words = ["model=llama3_8b", "data.batch_size=4", "data.max_length=2048", "memory.loss=liger"]
    config = plain("train", *words)
    shape, batch = Shape.of(config["model"]), batch_of(config)
    hidden = batch.all_tokens * shape.hidden * 2
    # Of 8,192 tokens a thirty-second, 256, are held together: 128,256 logits are as wide as 31.3 hidden states.
    assert loss_memory(config, shape, batch).forward == hidden + 256 * shape.vocabulary * 2


OTHERS = ["results/h100/table1_second_host", "results/h100/table1_third_host"]


@pytest.mark.parametrize(
    "words",
    [
        ["--table", "results/h100/planner"],
        ["--table", *OTHERS],
        ["--table", *(f"results/h100/{folder}" for folder in CHOICES)],
        ["--article"],
        pytest.param(["--cards"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_page_s_tables_are_what_the_script_prints(words):
    page = (DOCS / "planner.md").read_text().splitlines()
    command = [sys.executable, "benchmarks/planner.py", *words]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    missing = [line for line in lines if line and line not in page]
    assert len(lines) >= 3
    assert not missing, f"{' '.join(command[1:])} says otherwise: {missing[0]}"


def test_there_are_at_least_twelve_of_them():
    assert len(RECORDS.keys() - {*READ_OFF, *FURTHER_OFF}) >= 12


def test_the_constants_are_those_that_the_fit_gives():
    command = [sys.executable, "benchmarks/planner.py", "--fit"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for task, line in zip(("train", "infer"), said.splitlines(), strict=True):
        constant, share, context = map(float, re.findall(r"(?:_gb|share) ([\d.]+)", line))
        kept = constants()["reserved_beyond_allocated"][task]
        assert (kept["constant_gb"], kept["share"]) == pytest.approx((constant, share), rel=0.02)
        assert constants()["context_gb"][task] == pytest.approx(context, rel=0.01)
