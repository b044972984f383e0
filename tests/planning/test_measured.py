"""The planner against peaks that were measured on an H100, on configurations that its constants were not fitted to."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_at_home.planning.allocator import constants
from llm_at_home.planning.inference import predict_inference
from llm_at_home.planning.training import predict_training
from llm_at_home.records import store

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "results" / "h100" / "planner"
ERROR = 0.05
ROWS = sorted(path.parent.name for path in FOLDER.glob("*/record.json"))


def predict(record):
    if record.task == "train":
        return predict_training(record.config)
    return predict_inference(record.config, record.config["questions"]["prompt_tokens"])


@pytest.mark.parametrize("row", ROWS)
def test_the_predicted_peaks_are_within_five_per_cent(row):
    record = store.load(FOLDER / row)
    assert record.status == "ok"
    prediction = predict(record)
    for name in ("reserved", "process"):
        key = {"reserved": "torch_reserved_peak", "process": "process_memory_peak"}[name]
        measured = record.readings[key].value
        assert getattr(prediction, name) / 1e9 == pytest.approx(measured, rel=ERROR), key


def test_none_of_them_was_fitted_to():
    fitted = [ROOT / folder for folder in constants()["fitted_to"].values()]
    assert FOLDER not in fitted

    def essence(record):
        config = record.config
        groups = [config.get(group) for group in ("model", "quant", "adapter", "optimizer", "dtype")]
        memory = config.get("memory") or {"checkpointing": "none", "offload": False, "loss_tokens": None}
        sizes = [config.get("data", {}).get(key) for key in ("batch_size", "max_length")]
        engine, questions = config.get("engine", {}), config.get("questions", {})
        return [*groups, memory, *sizes, engine.get("batch_size"), questions.get("prompt_tokens")]

    seen = [essence(store.load(path.parent)) for folder in fitted for path in folder.glob("*/record.json")]
    new = [row for row in ROWS if essence(store.load(FOLDER / row)) not in seen]
    assert len(new) >= 12
