"""Fidelity is zero against itself, right against arithmetic done by hand, and orders bits on a real model."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_at_home.evaluation.fidelity import TextFidelity, compare, fidelity_readings

TEXTS = [list(range(100 + 50 * i, 130 + 50 * i)) for i in range(4)]


@pytest.fixture(scope="module")
def baseline(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def test_a_model_against_itself_loses_nothing(baseline):
    readings = fidelity_readings(compare(baseline, baseline, TEXTS))
    assert readings["kl_divergence_mean"].value == 0
    assert readings["kl_divergence_p99"].value == 0
    assert readings["top1_agreement"].value == 1
    assert readings["perplexity_ratio"].value == 1


def test_perplexity_and_divergence_are_those_of_their_definitions(baseline, tiny_model):
    other = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    torch.manual_seed(1)
    for parameter in other.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    (text,) = compare(other, baseline, TEXTS[:1])
    ids = torch.tensor(TEXTS[:1])
    with torch.no_grad():
        expected = float(other(ids, labels=ids).loss)
        p = torch.softmax(baseline(ids).logits[0, :-1].double(), -1)
        q = torch.softmax(other(ids).logits[0, :-1].double(), -1)
    assert text.nll / len(text.kl) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(torch.tensor(text.kl).double(), (p * (p / q).log()).sum(-1), rtol=1e-3, atol=1e-5)
    assert text.agrees.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    assert text.row()["tokens"] == 29


def test_intervals_resample_texts():
    texts = [TextFidelity(10.0 + i, 10.0, np.full(10, 0.1 * i), np.arange(10) < 9 - i) for i in range(5)]
    readings = fidelity_readings(texts)
    assert readings["kl_divergence_mean"].value == pytest.approx(0.2)
    assert readings["top1_agreement"].value == pytest.approx(0.7)
    assert readings["perplexity_ratio"].value == pytest.approx(math.exp(0.2))
    for reading in readings.values():
        low, high = reading.interval95
        assert low <= reading.value <= high
        assert reading.n == 5


def test_the_command_orders_bits_and_keeps_each_text(tmp_path, command):
    values = {}
    for bits in (8, 4, 2):
        folder = tmp_path / str(bits)
        words = ("task=fidelity", "quant=rtn", f"quant.bits={bits}", "quant.group_size=32", "limit=6")
        done = command("evaluate.py", *words, f"hydra.run.dir={folder}")
        assert done.returncode == 0, done.stderr
        record = json.loads((folder / "record.json").read_text())
        values[bits] = record["quality"]["kl_divergence_mean"]["value"]
        rows = [json.loads(line) for line in (folder / "fidelity.jsonl").read_text().splitlines()]
        assert len(rows) == record["counts"]["texts"] == 6
        assert sum(row["tokens"] for row in rows) == record["counts"]["tokens"]
        assert record["readings"]["bits_per_weight"]["value"] == pytest.approx(bits + 40 / 32)
    assert 0 < values[8] < values[4] < values[2]
