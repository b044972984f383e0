"""What others read: optimum-benchmark's report and PEFT's comparison, by the keys that their own code requires."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import yaml

from llm_at_home.records import __main__, store
from llm_at_home.records.export import export
from llm_at_home.records.export.peft_comparison import TYPES

RESULTS = Path(__file__).resolve().parents[3] / "results"
INFER = RESULTS / "h100" / "table1" / "nf4_b1"
ON_CPU = RESULTS / "two_core_cpu" / "demo" / "infer" / "nf4"
TRAIN = RESULTS / "h100" / "table3" / "lora_nf4"
HANDBOOK = RESULTS / "two_core_cpu" / "handbook" / "lora"


# The fields of optimum_benchmark/trackers/{memory,latency,energy}.py and benchmark/report.py; those without a default
# are required there.
@dataclass
class Memory:
    unit: str
    max_ram: float
    max_global_vram: float | None = None
    max_process_vram: float | None = None
    max_reserved: float | None = None
    max_allocated: float | None = None


@dataclass
class Latency:
    unit: str
    values: list
    count: int
    total: float
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    stdev: float
    stdev_: float


@dataclass
class Throughput:
    unit: str
    value: float


@dataclass
class Energy:
    unit: str
    cpu: float
    ram: float
    gpu: float
    total: float


READERS = {"memory": Memory, "latency": Latency, "throughput": Throughput, "energy": Energy, "efficiency": Throughput}
UNITS = {"memory": {"MB"}, "latency": {"s"}, "throughput": {"samples/s", "tokens/s", "images/s", "steps/s"}}


def read_report(report):
    """As BenchmarkReport.from_dict reads it: a null measurement is none, another must have every required field."""
    read = {}
    for target, measurements in report.items():
        read[target] = {}
        for name, values in measurements.items():
            if values is None:
                continue
            one = READERS[name](**values)
            required = [field for field in fields(one) if field.default is not None]
            assert all(getattr(one, field.name) is not None for field in required)
            assert one.unit in UNITS[name]
            read[target][name] = one
    return read


def test_an_inference_run_is_a_report_of_optimum_benchmark():
    record = store.load(INFER)
    report, missing = export(record, "optimum-benchmark")
    read = read_report(json.loads(json.dumps(report)))
    assert list(read) == ["load_model", "first_generate", "generate", "prefill", "decode", "per_token"]
    value = {name: reading.value for name, reading in record.readings.items()}
    assert read["decode"]["throughput"] == Throughput("tokens/s", value["decode_tokens_per_second"])
    assert read["load_model"]["latency"].p95 == value["load_time"]
    assert read["generate"]["memory"].max_allocated == pytest.approx(value["measured_torch_allocated_peak"] * 1000)
    assert read["generate"]["throughput"].value == pytest.approx(record.counts["turns"] / value["measured_time"])
    # Two passes were averaged, and a card's energy is not the machine's.
    assert "latency" not in read["prefill"]
    assert not any("energy" in target for target in read.values())
    assert any(line.startswith("prefill.latency: ") for line in missing)


def test_on_a_cpu_no_memory_of_a_card_is_invented():
    report, missing = export(store.load(ON_CPU), "optimum-benchmark")
    memory = read_report(report)["decode"]["memory"]
    assert memory.max_ram > 1000
    assert (memory.max_process_vram, memory.max_allocated) == (None, None)
    assert any("max_allocated: " in line for line in missing)
    assert read_report(report)["prefill"]["latency"].count == 1


def test_a_training_run_is_a_report_of_optimum_benchmark():
    record = store.load(TRAIN)
    read = read_report(export(record, "optimum-benchmark")[0])
    assert list(read) == ["overall", "warmup", "train"]
    assert read["train"]["throughput"] == Throughput("steps/s", record.readings["steps_per_second"].value)


# TrainConfig in method_comparison/MetaMathQA/utils.py.
TRAIN_CONFIG = {
    *("model_id", "dtype", "max_seq_length", "batch_size"),
    *("batch_size_eval", "max_steps", "eval_steps", "compile"),
    *("use_gc", "query_template", "seed", "grad_norm_clip"),
    *("optimizer_type", "optimizer_kwargs", "lr_scheduler", "use_amp"),
    *("autocast_adapter_dtype", "generation_kwargs", "attn_implementation", "init_kv_cache_prefix"),
}


def preprocessed(row):
    """What ``preprocess`` in method_comparison/processing.py looks up, by the same keys."""
    run, trained, meta = row["run_info"], row["train_info"], row["meta_info"]
    metrics, packages = trained["metrics"][-1], meta["package_info"]
    assert trained["status"] == "success"
    found = {key: run[key] for key in ("experiment_name", "total_time", "peft_config", "peft_branch", "created_at")}
    found["peft_type"] = run["peft_config"]["peft_type"] if run["peft_config"] else "full-finetuning"
    memory = ("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th")
    found |= {key: trained[key] for key in (*memory, "train_time", "file_size")}
    found |= {key: metrics[key] for key in ("test accuracy", "train loss", "train samples", "train total tokens")}
    found |= {
        name: packages[f"{name}-version"] for name in ("peft", "transformers", "datasets", "torch", "bitsandbytes")
    }
    return found | {"system": meta["system_info"], "model_id": run["train_config"]["model_id"]}


def test_a_training_run_is_a_result_of_peft_s_comparison():
    record = store.load(TRAIN)
    row, missing = export(record, "peft")
    assert row["run_info"]["train_config"].keys() == TRAIN_CONFIG
    assert not row["run_info"]["train_config"]["compile"]
    record.counts["compiled_layers"] = 2
    assert export(record, "peft")[0]["run_info"]["train_config"]["compile"]
    found = preprocessed(json.loads(json.dumps(row)))
    assert found["peft_type"] == "LORA"
    assert found["peft_config"]["r"] == 64
    assert "_target_" not in found["peft_config"]
    assert row["run_info"]["train_config"]["dtype"] == "int4"
    assert row["run_info"]["train_config"]["batch_size"] == 8
    assert found["accelerator_memory_max"] == round(record.readings["torch_reserved_peak"].value * 1e9)
    assert found["train samples"] == 12 * 8
    speed = record.readings["steps_per_second"]
    assert found["train_time"] == pytest.approx(record.readings["warmup_time"].value + 10 / speed.value)
    assert found["accelerator_memory_reserved_avg"] is None
    assert found["test accuracy"] is None
    assert any("--evaluation" in line for line in missing)


def test_the_accuracy_is_that_of_the_run_s_own_evaluation():
    row, _ = export(store.load(HANDBOOK / "train"), "peft", store.load(HANDBOOK / "text"))
    assert preprocessed(row)["test accuracy"] == pytest.approx(0.9583, abs=1e-4)
    assert preprocessed(row)["accelerator_memory_max"] is None


@pytest.mark.parametrize(("run", "more"), [(TRAIN, set()), (HANDBOOK / "train", {"accelerator_memory_max"})])
def test_the_docs_name_what_peft_s_load_df_cannot_take(run, more):
    found = preprocessed(export(store.load(run), "peft")[0])
    # What load_df makes whole numbers of, rounded times among them.
    memory = {f"accelerator_memory_{key}" for key in ("reserved_avg", "max", "reserved_99th")}
    whole = {*memory, "file_size", "train samples", "train total tokens", "total_time", "train_time"}
    null = {key for key in whole if found[key] is None}
    assert null == {*memory, "file_size", "train total tokens"} - {"accelerator_memory_max"} | more
    said = (RESULTS.parent / "docs" / "records.md").read_text()
    for key in null - {"accelerator_memory_reserved_99th"}:
        assert f"`{key.replace(' ', '_')}`" in said


def test_full_fine_tuning_has_no_configuration_of_peft():
    row, _ = export(store.load(RESULTS / "two_core_cpu" / "handbook" / "full" / "train"), "peft")
    assert preprocessed(row)["peft_type"] == "full-finetuning"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ([INFER, "--format", "peft"], "of training runs"),
        ([HANDBOOK / "text", "--format", "optimum-benchmark"], "inference or training"),
        ([RESULTS / "h100/emulation/t4_0", "--format", "optimum-benchmark"], "ended with out_of_memory"),
        ([TRAIN, "--format", "peft", "--evaluation", HANDBOOK / "text"], "of this very training run"),
        ([INFER, "--format", "optimum-benchmark", "--evaluation", HANDBOOK / "text"], "leave out --evaluation"),
        ([INFER, "--format", "optimum-benchmark", "--out", INFER / "record.json"], "exists"),
        ([RESULTS / "two_core_cpu/handbook/bottleneck/train", "--format", "peft"], "none of the methods of PEFT's"),
    ],
)
def test_what_a_format_has_no_place_for_is_refused(capsys, words, hint):
    assert __main__.main(["export", *map(str, words)]) == 2
    assert hint in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_types_are_those_of_peft():
    import peft

    named = {
        yaml.safe_load(path.read_text()).get("_target_", "") for path in (RESULTS.parent / "conf/adapter").glob("*")
    }
    assert {name.removeprefix("peft.") for name in named if name.startswith("peft.")} == TYPES.keys()
    needed = {"AdaLoraConfig": {"total_step": 1}}
    for name, kind in TYPES.items():
        assert getattr(peft, name)(**needed.get(name, {})).peft_type.value == kind


def test_the_command_writes_the_file_and_names_what_is_null(tmp_path, capsys):
    out = tmp_path / "benchmark_report.json"
    assert __main__.main(["export", str(INFER), "--format", "optimum-benchmark", "--out", str(out)]) == 0
    read_report(json.loads(out.read_text()))
    assert "null: energy, efficiency: " in capsys.readouterr().err
