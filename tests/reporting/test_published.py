"""The paper's figures, and this project's scaled to their size."""

from __future__ import annotations

import pytest

from llm_at_home.records.schema import Reading
from llm_at_home.reporting import facts, published, tables
from llm_at_home.reporting.load import load


def test_the_tokens_that_the_energies_imply_are_within_the_cards_power() -> None:
    """Energy times speed over tokens is the mean power; published.yaml states these watts."""
    found = published.table1()
    watts = [
        round(row["energy_wh"] * 3600 * row["tokens_per_second"] / found["generated_tokens"])
        for row in found["rows"]
        if row["tokens_per_second"]
    ]
    assert watts == [300, 146, 263, 162]


def test_a_run_finds_its_row_by_quantization_and_dtype(make) -> None:
    def name(**choices):
        row = published.counterpart(make.infer(**choices))
        return row and row["name"]

    assert name(quant="nf4", dtype="bfloat16") == "BnB"
    assert name(quant="none", dtype="float32") == "no quantization"
    assert name(quant="none", dtype="bfloat16") is None
    assert name(quant="int8") is None


def test_a_pruned_run_is_named_and_is_no_row_of_the_paper_s(make) -> None:
    wanda = {"name": "wanda", "sparsity": 0.5, "pattern": "unstructured", "kernel": "dense"}
    record = make.infer(quant="nf4", dtype="bfloat16")
    record.config["prune"] = {"name": "none"}
    assert published.counterpart(record) is not None
    record.config["prune"] = wanda
    assert published.counterpart(record) is None
    assert facts.quant_words(record)[-1] == "wanda 50 %"


def test_energy_and_time_are_scaled_from_the_sample_and_say_so(make, save, runs) -> None:
    record = make.infer(engine={"batch_size": 16})
    record.counts = {"generated_tokens": 4_000}
    record.readings |= {
        "energy_per_token": Reading(3.6, "J/token", "nvml_counter"),
        "output_tokens_per_second": Reading(200.0, "tokens/s", "clock"),
    }
    energy, hours = published.scaled_energy(record), published.scaled_time(record)
    assert (energy.value, energy.unit) == (pytest.approx(40.0), "Wh")
    assert (hours.value, hours.unit) == (pytest.approx(200 / 3600), "h")
    assert energy.method == "nvml_counter, scaled from a sample of 4,000 tokens to 40,000"
    save(record, "a")
    (row,) = next(t for t in tables.build(load([runs])) if t.key == "inference").rows
    shown = {key: row.cells[key].entries[0].text for key in ("batch_size", "energy_scaled_40k", "time_scaled_40k")}
    assert shown == {"batch_size": "16", "energy_scaled_40k": "40.0", "time_scaled_40k": "0.056"}


def test_what_was_not_measured_is_not_scaled(make, save, runs) -> None:
    record = make.infer()
    record.readings["energy_per_token"] = Reading.unknown("J/token", "no counter")
    record.readings.pop("output_tokens_per_second", None)
    assert published.scaled_energy(record).reason == "no counter"
    assert published.scaled_time(record) is None
    save(record, "a")
    (row,) = next(t for t in tables.build(load([runs])) if t.key == "inference").rows
    for key in ("energy_scaled_40k", "time_scaled_40k", "batch_size"):
        (entry,) = row.cells[key].entries
        assert entry.value is None
        assert entry.reason
