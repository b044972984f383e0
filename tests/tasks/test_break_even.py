"""benchmarks/break_even.py: the arithmetic on numbers worked out by hand, what it runs, and the page's tables."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

from llm_at_home.records import store
from llm_at_home.records.schema import Reading, Record

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "prompt_or_finetune.md"
NO_METER = "no counter here"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as when the script is run
    spec = importlib.util.spec_from_file_location("break_even", ROOT / "benchmarks" / "break_even.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["break_even"] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def asked(
    prompt: float, generated: float, seconds: tuple[float, float, float], joules: float | None, shared: float = 0.0
) -> Record:
    """An evaluation's record; ``seconds`` is a value and its interval."""
    energy = {"energy_gross": Reading.unknown("Wh", NO_METER), "energy_per_question": Reading.unknown("J", NO_METER)}
    if joules is not None:
        energy = {"energy_per_question": Reading(joules, "J/question", "rapl")}
    readings = {
        "prompt_tokens_per_question": Reading(prompt, "tokens", "counted"),
        "generated_tokens_per_question": Reading(generated, "tokens", "counted"),
        "prompt_tokens_shared": Reading(shared, "tokens", "counted"),
        "time_per_question": Reading(seconds[0], "s", "clock", interval95=seconds[1:]),
        **energy,
    }
    return Record("evaluate", readings=readings, quality={"exact_match": Reading(0.5, "1", "squad")})


def trained(wh: float | None, seconds: float = 300.0) -> Record:
    energy = Reading.unknown("Wh", NO_METER) if wh is None else Reading(wh, "Wh", "rapl")
    rates = {
        "tokens_per_second": Reading(200.0, "tokens/s", "clock"),
        "steps_per_second": Reading(0.5, "steps/s", "clock"),
    }
    readings = {"energy_gross": energy, **rates}
    counts = {"optimizer_steps": 100}
    return Record("train", readings=readings, counts=counts, provenance={"seconds": seconds}, config_hash="t")


@pytest.mark.parametrize(
    ("fixed", "prompted", "tuned", "questions"),
    [
        (100.0, (3.0, 3.0, 3.0), (1.0, 1.0, 1.0), (50, 50, 50)),
        (100.0, (4.0, 3.0, 5.0), (1.0, 0.5, 2.0), (34, 23, 100)),
        (10.0, (2.0, 1.0, 3.0), (1.5, 1.0, 2.0), (20, 5, math.inf)),
        (10.0, (1.0, 0.5, 3.0), (2.0, 1.0, 3.0), (math.inf, 5, math.inf)),
        (10.0, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (math.inf, math.inf, math.inf)),
    ],
)
def test_break_even_by_hand(script, fixed, prompted, tuned, questions) -> None:
    found = script.break_even(fixed, script.Cost(*prompted), script.Cost(*tuned))
    assert (found.questions, found.low, found.high) == questions


def test_one_question_less_and_prompting_is_still_the_cheaper(script) -> None:
    found = script.break_even(100.0, script.Cost(4.0, 4.0, 4.0), script.Cost(1.0, 1.0, 1.0)).questions
    assert 100 + found * 1 <= found * 4
    assert 100 + (found - 1) * 1 > (found - 1) * 4


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ((1234.0, 1234.0, 1234.0), "1,234"),
        ((34.0, 23.0, 100.0), "34 [23, 100]"),
        ((20.0, 5.0, math.inf), "20 [5, never]"),
        ((math.inf, 5.0, math.inf), "never [5, never]"),
        ((math.inf, math.inf, math.inf), "never"),
    ],
)
def test_how_it_is_written(script, ends, said) -> None:
    assert str(script.BreakEven(*ends)) == said


def test_from_records_to_tokens_time_and_energy(script) -> None:
    # Training: 200 / 0.5 tokens a step x 100 steps = 40,000 tokens, 300 s, 2 Wh.
    prompted = asked(790, 10, (1.5, 1.25, 1.75), 4500, shared=750)
    tuned = asked(30, 10, (0.5, 0.25, 0.75), 900, shared=10)
    for record in (prompted, tuned):
        record.readings["prefill_tokens_per_second"] = Reading(1000.0, "tokens/s", "clock")
    found = script.break_evens(trained(2.0), prompted, tuned)
    assert found["tokens"].questions == math.ceil(40_000 / 760)
    assert found["tokens, prefix kept"].questions == math.ceil(40_000 / ((800 - 750) - (40 - 10)))
    assert (found["time"].questions, found["time"].low, found["time"].high) == (300, 200, 600)
    # 0.75 s of 1.5 and 0.01 s of 0.5 are the prefix.
    assert found["time, prefix kept (estimate)"].questions == math.ceil(300 / (0.75 - 0.49))
    assert found["energy"].questions == 2  # 4,500 J is 1.25 Wh and 900 J is 0.25 Wh


def test_what_was_not_measured_is_unknown_with_its_reason(script) -> None:
    prompted, tuned = asked(790, 10, (1.5, 1.4, 1.6), None), asked(30, 10, (0.5, 0.4, 0.6), None)
    found = script.break_evens(trained(None), prompted, tuned)
    assert found["energy"] == f"unknown: {NO_METER}"
    train = trained(None)
    train.readings["steps_per_second"] = Reading.unknown("steps/s", "one step")
    found = script.break_evens(train, prompted, tuned)
    assert found["tokens"] == found["tokens, prefix kept"] == "unknown: not measured"
    assert found["time, prefix kept (estimate)"] == "unknown: not measured", "no prefill rate"
    assert found["time"].questions == 300


@pytest.fixture
def main(script, monkeypatch):
    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["break_even.py", *map(str, words)])
        return script.main()

    return run


def test_rows_are_run_alike_and_once(script, main, tmp_path, monkeypatch, capsys) -> None:
    adapter, out = tmp_path / "adapter_run", tmp_path / "out"
    store.save(trained(None), adapter)
    store.save(asked(30, 10, (0.5, 0.4, 0.6), None), out / "nothing")
    ran = {}

    def run_row(name, words, folder, headline, keep):
        ran[name] = words
        store.save(asked(30, 10, (0.5, 0.4, 0.6), None), folder / name)
        return name

    monkeypatch.setattr(script.common, "run_row", run_row)
    assert main("--out", out, "--adapter", adapter, "--limit", 7, "--", "gpu=cpu") == 0
    assert set(ran) == {"retrieved", "all", "fine_tuned"}
    assert all({"text.batch_size=1", "limit=7", "gpu=cpu"} <= set(words) for words in ran.values())
    assert f"adapter_path={adapter}" in ran["fine_tuned"]
    assert not [word for word in ran["fine_tuned"] if word.startswith("text.context")]
    assert "text.context=retrieved" in ran["retrieved"]
    assert store.load(out / "train").config_hash == "t"
    said = capsys.readouterr().out
    assert "Fine-tuning once: 40,000 tokens, 300 s, energy unknown (no counter here)." in said
    assert "| time | never" in said
    ran.clear()
    assert main("--out", out, "--adapter", adapter) == 0
    assert not ran


def test_a_row_that_failed_fails_the_command_and_is_run_again(script, main, tmp_path, monkeypatch) -> None:
    adapter, out = tmp_path / "adapter_run", tmp_path / "out"
    store.save(trained(None), adapter)
    ran = []

    def run_row(name, words, folder, headline, keep):
        ran.append(name)
        record = asked(30, 10, (0.5, 0.4, 0.6), None)
        record.status = "failed" if name == "all" else "ok"
        store.save(record, folder / name)
        return name

    monkeypatch.setattr(script.common, "run_row", run_row)
    assert [main("--out", out, "--adapter", adapter) for _ in range(2)] == [1, 1]
    assert ran == ["fine_tuned", "all", "retrieved", "nothing", "all"]


def test_weights_of_another_run_are_not_taken_for_those_of_the_record(script, tmp_path) -> None:
    kept, run = tmp_path / "kept", tmp_path / "run"
    store.save(trained(None), kept)
    store.save(trained(None), run)
    assert not script.is_there(kept, run), "no weights"
    (run / "adapter").mkdir()
    assert script.is_there(kept, run)
    other = trained(None)
    other.config_hash = "u"
    store.save(other, run)
    assert not script.is_there(kept, run)


def test_weights_are_not_made_again_once_they_have_answered(script, main, tmp_path, monkeypatch) -> None:
    store.save(trained(None), tmp_path / "train")
    store.save(asked(30, 10, (0.5, 0.4, 0.6), None), tmp_path / "fine_tuned")
    ran = []

    def run_row(name, words, folder, headline, keep):
        ran.append(name)
        store.save(asked(30, 10, (0.5, 0.4, 0.6), None), folder / name)
        return name

    monkeypatch.setattr(script.common, "run_row", run_row)
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: pytest.fail("trains again"))
    assert main("--out", tmp_path) == 0
    assert ran == ["all", "retrieved", "nothing"]


@pytest.mark.parametrize("machine", ["two_core_cpu", "h100"])
def test_the_page_s_tables_are_those_of_the_committed_records(script, machine) -> None:
    blocks = script.table(ROOT / "results" / machine / "break_even").split("\n\n")
    assert len(blocks) == 3
    for block in blocks:
        assert block in PAGE.read_text(), f"python benchmarks/break_even.py --table results/{machine}/break_even"


def test_a_row_that_is_not_there_is_in_no_table(script, tmp_path) -> None:
    for name in ("train", "nothing", "all", "fine_tuned"):  # all but retrieved
        store.save(store.load(ROOT / "results" / "h100" / "break_even" / name), tmp_path / name)
    facts, _, questions = script.table(tmp_path).split("\n\n")
    assert [line.split(" | ")[0] for line in facts.splitlines()[2:]] == ["| nothing", "| all", "| fine-tuned"]
    assert questions.splitlines()[0].endswith("in | than all |")
