"""benchmarks/table1.py: what it skips, what it runs again, and the table of what is there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from llm_at_home.records import store
from llm_at_home.records.schema import Reading, Record

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("gpu=cpu", "engine.max_new_tokens=4", "engine.warmup_tokens=1", "model.architecture.num_hidden_layers=2"),
    *("model.architecture.hidden_size=64", "model.architecture.intermediate_size=128"),
    *("model.architecture.num_attention_heads=4", "model.architecture.num_key_value_heads=4"),
]


@pytest.fixture(scope="module")
def table1() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as when the script is run
    spec = importlib.util.spec_from_file_location("table1", ROOT / "benchmarks" / "table1.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(quant: str, batch: int, status: str = "ok", dtype: str = "bfloat16", **values: float) -> Record:
    config = {"quant": {"name": quant}, "dtype": dtype, "engine": {"batch_size": batch}, "gpu": {"device": "cuda"}}
    readings = {key: Reading(value, "1", "clock") for key, value in values.items()}
    return Record("infer", status, config, readings=readings, counts={"generated_tokens": 500})


@pytest.fixture
def main(table1, monkeypatch):
    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["table1.py", *map(str, words)])
        return table1.main()

    return run


def test_the_papers_rows_come_first_each_batch_in_turn(table1) -> None:
    names = [name for name, _ in table1.rows([*table1.OTHERS, *table1.PAPER], [1, 64])]
    assert names[:2] == ["none_float32_b1", "none_bfloat16_b1"]
    assert names.index("awq_b64") < names.index("fp4_b1")
    assert len(set(names)) == len(names) == 22
    assert dict(table1.rows(["none_float32"], [4])) == {
        "none_float32_b4": ["experiment=[paper/none_float32,table1]", "engine.batch_size=4"]
    }


def test_finished_rows_and_those_out_of_memory_are_not_run_again(table1, main, tmp_path, monkeypatch, capsys) -> None:
    store.save(record("nf4", 1), tmp_path / "nf4_b1")
    store.save(record("int8", 1, "out_of_memory"), tmp_path / "int8_b1")
    store.save(record("fp4", 1, "failed"), tmp_path / "fp4_b1")
    ran = []

    def run_row(name, words, out, headline, keep):
        ran.append((name, words))
        store.save(record("x", 1), out / name)
        return name

    monkeypatch.setattr(table1.common, "run_row", run_row)
    words = ("--out", tmp_path, "--rows", "nf4", "int8", "fp4", "rtn", "--batches", 1, "--", "gpu=cpu", "repeats=2")
    assert main(*words) == 0
    assert [name for name, _ in ran] == ["fp4_b1", "rtn_b1"]
    assert all(words[-2:] == ["gpu=cpu", "repeats=2"] for _, words in ran)
    assert capsys.readouterr().out.splitlines() == ["int8_b1: is there", "nf4_b1: is there", "fp4_b1", "rtn_b1"]


def test_no_row_starts_after_the_time(table1, main, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(table1.common, "run_row", lambda *arguments: pytest.fail("a row was started"))
    assert main("--out", tmp_path, "--minutes", -1, "--", "gpu=cpu") == 0
    assert "goes on with none_float32_b1" in capsys.readouterr().out


def test_the_table_sets_the_papers_figures_beside_batch_1_only(main, tmp_path, capsys) -> None:
    measured = {"energy_per_token": 3.6, "output_tokens_per_second": 40.0, "decode_tokens_per_second": 39.0}
    passes = {f"decode_tokens_per_second_{end}": value for end, value in (("median", 41.0), ("min", 20), ("max", 50))}
    store.save(record("nf4", 16, **measured), tmp_path / "nf4_b16")
    store.save(record("nf4", 1, **measured, **passes), tmp_path / "nf4_b1")
    store.save(record("none", 64, "out_of_memory", "float32"), tmp_path / "none_float32_b64")
    assert main("--table", tmp_path) == 0
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    titles, _, dense, one, sixteen = lines
    assert dense[:2] == ["none_float32 (out of memory)", "64"]
    assert set(dense[2:]) == {"–"}
    row = dict(zip(titles, one, strict=True))
    assert row["decode (tokens/s), median of passes"] == "41.0"
    assert row["min–max"] == "20.0–50.0"
    assert row["40,000 tokens, scaled (Wh)"] == "40.0"
    assert row["40,000 tokens, scaled (h)"] == "0.28"
    assert one[-3:] == ["8.40", "25.45", "63.53"]
    assert sixteen[6:8] == ["39.0", "–"]
    assert sixteen[-3:] == ["–"] * 3


def test_without_a_gpu_it_says_so(tmp_path) -> None:
    words = [sys.executable, "benchmarks/table1.py", "--out", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "table1.py needs a CUDA GPU, and none is visible\n")


@pytest.mark.slow
def test_a_small_architecture_runs_the_whole_way(table1, main, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    words = ("--out", out, "--rows", "none_float32", "nf4", "--batches", 1, 4, "--", *SMALL)
    assert main(*words, f"paths.output={tmp_path}/multirun") == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4
    assert all(": ok in " in line for line in said)
    records = {path.name: store.load(path) for path in out.iterdir()}
    assert records["nf4_b4"].counts["generated_tokens"] == 4 * 4 * 3
    assert records["nf4_b4"].readings["decode_tokens_per_second"].method == "token_on_host_clock_batch_4"
    assert main(*words) == 0
    assert all(line.endswith(": is there") for line in capsys.readouterr().out.splitlines())
    assert main("--out", out, "--rows", "nf4", "--batches", 0, "--", *SMALL) == 1
    assert "nf4_b0: no record" in capsys.readouterr().out
