"""Two fidelity runs against each other: paired, told from noise, and refused where they cannot be compared."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest

from llm_at_home.errors import Refusal
from llm_at_home.evaluation.__main__ import main
from llm_at_home.evaluation.fidelity import ROWS
from llm_at_home.evaluation.fidelity.comparison import Run, compare, describe, is_control
from llm_at_home.evaluation.fidelity.figures import FIGURES
from llm_at_home.records import store

RTN = ("quant=rtn", "quant.group_size=32")


@pytest.fixture(scope="module")
def four_bits(fidelity_run):
    return Run.load(fidelity_run(*RTN, "quant.bits=4"))


@pytest.fixture(scope="module")
def eight_bits(fidelity_run):
    return Run.load(fidelity_run(*RTN, "quant.bits=8"))


@pytest.fixture(scope="module")
def other_draw(fidelity_run):
    return Run.load(fidelity_run(*RTN, "quant.bits=4", "fidelity.answers_seed=1"))


def changed(run, folder, **hashes):
    """A copy of a run that claims to have been measured on other texts or another baseline."""
    shutil.copytree(run.folder, folder)
    record = store.load(folder)
    record.provenance["fidelity"]["held_out"] |= hashes
    store.save(record, folder)
    return Run.load(folder)


def test_differences_are_paired_by_text(four_bits, eight_bits):
    found = {one.figure: one for one in compare(four_bits, eight_bits)}
    assert len(found) == 2 * len(FIGURES)
    for name in ("kl_divergence_mean", "kl_divergence_mean_own_answers"):
        one = found[name]
        assert one.a == four_bits.record.quality[name].value
        assert one.b == eight_bits.record.quality[name].value
        low, high = one.interval95
        assert 0 < low < one.difference < high, "four bits lose more on every text"
        assert one.excludes_zero
        assert one.detectable > 0


def test_the_other_way_round_it_is_the_same_with_the_sign_changed(four_bits, eight_bits):
    for one, other in zip(compare(four_bits, eight_bits), compare(eight_bits, four_bits), strict=True):
        assert one.difference == -other.difference
        assert one.interval95 == pytest.approx([-other.interval95[1], -other.interval95[0]])
        assert one.detectable == pytest.approx(other.detectable)


def test_a_run_does_not_differ_from_itself(four_bits):
    for one in compare(four_bits, four_bits):
        assert one.difference == one.detectable == 0
        assert not one.excludes_zero


def test_two_draws_of_answers_are_a_control_question_by_question(four_bits, other_draw):
    assert is_control(four_bits.record, other_draw.record)
    found = compare(four_bits, other_draw)
    assert [one.figure for one in found] == [f"{name}_own_answers" for name in FIGURES]
    assert any(one.difference for one in found)
    assert not is_control(four_bits.record, four_bits.record)


def test_runs_that_cannot_be_compared_are_refused(four_bits, eight_bits, other_draw, fidelity_run, tmp_path):
    with pytest.raises(Refusal, match=r"fidelity\.answers_seed"):
        compare(eight_bits, other_draw)
    with pytest.raises(Refusal, match=r"texts of held_out differ.*limit"):
        compare(four_bits, changed(eight_bits, tmp_path / "texts", texts="0"))
    with pytest.raises(Refusal, match=r"baseline of held_out differ.*package versions"):
        compare(four_bits, changed(eight_bits, tmp_path / "baseline", baseline="0"))
    with pytest.raises(Refusal, match=r"fidelity\.answer_tokens \(8 and 0\)"):
        compare(four_bits, Run.load(fidelity_run("fidelity.answer_tokens=0")))


def test_a_folder_without_a_whole_fidelity_run_is_refused(four_bits, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(four_bits.folder, folder)
    (folder / ROWS).unlink()
    with pytest.raises(Refusal, match="rerun=true"):
        Run.load(folder)
    record = store.load(folder)
    record.status = "failed"
    store.save(record, folder)
    with pytest.raises(Refusal, match="no finished fidelity run"):
        Run.load(folder)


def test_the_command_prints_each_figure_or_one_line_of_refusal(four_bits, eight_bits, other_draw, capsys):
    assert main(["compare", str(four_bits.folder), str(eight_bits.folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a: rtn, 4 bits, groups of 32")
    (line,) = (line for line in lines if line.startswith("kl_divergence_mean "))
    assert " yes " in line
    assert len(lines) == 3 + 2 * len(FIGURES)
    assert main(["compare", str(eight_bits.folder), str(other_draw.folder)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert main(["compare", str(four_bits.folder), str(other_draw.folder)]) == 0
    assert "noise" in capsys.readouterr().out


def test_what_overflows_is_left_out(four_bits, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(four_bits.folder, folder)
    rows = [row | {"nll": None} for row in four_bits.rows]
    (folder / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = {one.figure for one in compare(Run.load(folder), four_bits)}
    assert "kl_divergence_mean" in figures
    assert "perplexity" not in figures


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("quant=none",), "none, float32"),
        (("quant=none", "dtype=bfloat16"), "none, bfloat16"),
        (("quant=nf4_nested",), "nf4_nested"),
        (("quant=int8",), "int8"),
        (("quant=rtn", "quant.bits=3"), "rtn, 3 bits, groups of 64"),
        (("quant=rtn", "quant.granularity=channel", "quant.scheme=symmetric"), "rtn, 4 bits, per channel, symmetric"),
        (("quant=gptq", "quant.bits=3"), "gptq, 3 bits, groups of 64, symmetric, bfloat16"),
        (("quant=gptq", "quant.desc_act=true"), "gptq, 4 bits, groups of 64, symmetric, act-order, bfloat16"),
        (("quant=gptq_mixed",), "gptq_mixed, 4 bits on average, groups of 64, symmetric, bfloat16"),
        (("quant=awq", "dtype=float32"), "awq, 4 bits, groups of 64"),
        (("quant=gguf", "quant.type=Q4_1"), "gguf, Q4_1"),
        (("quant=gguf", "quant.path=/models/some-Q5_K_M.gguf"), "gguf, some-Q5_K_M.gguf"),
    ],
)
def test_a_run_is_named_by_what_matters(fidelity_config, overrides, said):
    assert describe(fidelity_config(*overrides)) == said


def test_the_tables_hold_every_run_both_controls_and_the_pairs(
    four_bits, other_draw, fidelity_run, tmp_path, capsys, monkeypatch
):
    table = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "fidelity_table.py"))
    dense = [Run.load(fidelity_run("quant=none", f"dtype={dtype}")) for dtype in ("float32", "bfloat16")]
    runs = [four_bits, other_draw, *dense, Run.load(fidelity_run("quant=nf4"))]
    for i, run in enumerate(runs):
        shutil.copytree(run.folder, tmp_path / str(i))
    monkeypatch.setattr("sys.argv", ["fidelity_table.py", str(tmp_path)])
    assert table["main"]() == 0
    parts = capsys.readouterr().out.strip().split("\n\n")
    held_out, own_answers, controls, pairs = (part.splitlines() for part in parts[1::2])
    assert len(held_out) == len(own_answers) == 2 + len(runs)
    assert held_out[2].startswith("| none, float32 | 32.00 | 1.000")
    figure = four_bits.record.quality["kl_divergence_mean"].value
    assert any(line.startswith("| rtn, 4 bits, groups of 32 |") and f"{figure:.4f}" in line for line in held_out)
    # Float32 against bfloat16 on both sets; two draws on own answers alone.
    assert [line.split(" | ")[2] for line in controls[2:]].count("held-out texts") == 1
    assert sum("answers' seed 1" in line for line in controls) == 1
    assert len(controls) == 2 + 3
    assert len(pairs) == 2 + 2
    assert all(line.startswith("| nf4 | rtn, 4 bits") for line in pairs[2:])
