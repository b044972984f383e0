"""The adapters' benchmarks: what they would run composes, and the page's tables are those of the committed records."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import LlamaConfig, LlamaForCausalLM

from llm_at_home.data import sources
from llm_at_home.errors import Refusal
from llm_at_home.records import store
from llm_at_home.records.schema import Reading, Record
from llm_at_home.reporting import published
from llm_at_home.tasks import resolve

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
RESULTS = ROOT / "results"


def script(name: str) -> ModuleType:
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as when the script is run
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "folder", "page"),
    [
        ("adapter_matrix", "two_core_cpu/adapter_matrix", "adapters.md"),
        ("table3", "h100/table3", "adapters.md"),
        ("train_serve", "two_core_cpu/train_serve", "adapters.md"),
        ("handbook", "two_core_cpu/handbook", "adapters.md"),
        ("training_memory", "two_core_cpu/training_memory", "memory.md"),
        ("training_memory", "h100/training_memory", "memory.md"),
        ("training_memory", "h100/training_memory_nf4", "memory.md"),
        ("training_memory", "h100/training_memory_full", "memory.md"),
        ("padding", "two_core_cpu/padding", "memory.md"),
        ("pruning", "two_core_cpu/pruning", "pruning.md"),
        ("convergence", "two_core_cpu/convergence", "memory.md"),
        ("judging", "two_core_cpu/mt_bench", "judging.md"),
        ("judging", "h100/mt_bench", "judging.md"),
        ("judge_faults", "two_core_cpu/judge_faults", "judging.md"),
        ("decode", "h100/decode", "decoding.md"),
        ("batch", "h100/batch", "decoding.md"),
        ("batch", "h100/batch_lengths", "decoding.md"),
        ("finetune", "h100/finetune", "fast_training.md"),
        ("finetune", "h100/finetune_without_graph", "fast_training.md"),
        ("finetune", "h100/finetune_float16", "fast_training.md"),
        ("engines", "two_core_cpu/engines", "inference.md"),
        ("serve", "h100/serve", "serving.md"),
    ],
)
def test_the_page_s_tables_are_those_of_the_records(name, folder, page):
    lines = script(name).table(RESULTS / folder).splitlines()
    assert len(lines) >= 3
    page = (DOCS / page).read_text().splitlines()
    missing = [line for line in lines if line and line not in page]
    assert not missing, f"python benchmarks/{name}.py --table results/{folder} says otherwise: {missing[0]}"


@pytest.mark.parametrize("file", sorted((RESULTS / "h100" / "lokr").glob("*.json")), ids=lambda file: file.stem)
def test_lokr_s_tables_are_those_of_the_files(file):
    assert script("lokr").table(json.loads(file.read_text())) in (DOCS / "adapters.md").read_text()


def refusal(command: str, words: list[str]) -> str | None:
    words = ["logger=none", "gpu=cpu", *words]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = resolve.resolve(command, compose(command, words), words)
    try:
        resolve.check(command, config)
    except Refusal as refused:
        return str(refused)
    return None


def test_every_row_of_table_3_and_every_adapter_of_the_handbook_composes():
    table3, handbook = script("table3"), script("handbook")
    for words in table3.ROWS.values():
        assert refusal("train", words) is None
    for words, rates in handbook.ADAPTERS.values():
        assert refusal("train", ["experiment=handbook", *words, f"optimizer.lr={rates[0]}", *handbook.TRIAL]) is None


def test_every_row_of_pruning_composes_those_of_speed_on_a_gpu(monkeypatch):
    pruning = script("pruning")

    def own(command):  # what is not given anyway
        return [word for word in command[1:] if word not in ("logger=none", "gpu=cuda")]

    for words in pruning.QUALITY.values():
        assert refusal("evaluate", [*own(pruning.FIDELITY), *words]) is None
    card = {"device": "cuda", "card": "H100", "emulated": False, "compute_capability": "9.0"}
    monkeypatch.setattr(resolve, "resolve_device", lambda gpu: {**gpu, **card})
    for words in pruning.SPEED.values():
        assert refusal("infer", [*own(pruning.INFER), *words]) is None


def test_every_row_of_the_training_benchmarks_composes_and_a_gpu_s_are_refused_on_a_cpu():
    memory, convergence, padding = (script(name) for name in ("training_memory", "convergence", "padding"))
    written = str(padding.CONVERSATIONS)  # by the script, when it measures
    protocol = [word.replace(written, str(sources.HANDBOOK / "train.jsonl")) for word in padding.PROTOCOL[1:]]
    for words in padding.ROWS.values():
        assert refusal("train", [*protocol, *words]) is None
    for words in memory.ROWS.values():
        assert refusal("train", [*memory.PROTOCOL[1:], *words]) is None
    for words in memory.GPU_ROWS.values():
        assert refusal("train", [*memory.PROTOCOL[1:], *words]) is not None
    for words, rates in convergence.METHODS.values():
        assert refusal("train", [*convergence.PROTOCOL[1:], *words, f"optimizer.lr={rates[0]}"]) is None


def test_a_choice_s_time_is_told_beside_a_reference_of_the_same_card_alone(tmp_path):
    memory = script("training_memory")

    def keep(name, card, peak, rate):
        readings = {
            "torch_allocated_peak": Reading(peak, "GB", "torch_peak"),
            "steps_per_second": Reading(rate, "steps/s", "synchronized_clock"),
        }
        gpu = {"name": "NVIDIA H100 80GB HBM3", "uuid": f"GPU-{card}-cc14-8c09-734a-f1cbfddc67f3"}
        store.save(Record("train", provenance={"gpu": [gpu]}, readings=readings), tmp_path / name)

    keep("one_batch", "9375caf1", 20.0, 4.0)
    keep("checkpointing_full", "9375caf1", 15.0, 2.0)
    keep("offload", "2de27754", 10.0, 1.0)
    assert [line.split(" | ")[3:5] for line in memory.table(tmp_path).splitlines()[2:]] == [
        ["1.00", "1.00"],
        ["0.75", "2.00"],
        ["0.50", memory.common.DASH],
    ]
    (tmp_path / "one_batch" / store.RECORD).unlink()
    assert all(line.split(" | ")[3:5] == [memory.common.DASH] * 2 for line in memory.table(tmp_path).splitlines()[2:])


def test_the_rows_that_others_read_are_those_of_the_files():
    folders = [("decode", "decode"), ("batch", "batch"), ("batch", "batch_lengths")]
    folders += [("decode", "decode_third_host"), ("batch", "batch_lengths_third_host")]
    folders += [("finetune", "finetune"), ("finetune", "finetune_float16")]
    for name, folder in ((name, RESULTS / "h100" / folder) for name, folder in folders):
        benchmark = script(name)
        order = [benchmark.WORK] if name == "finetune" else []
        found = benchmark.rows(benchmark.common.stored(folder, *order))
        assert json.loads((folder / "rows.json").read_text()) == {"rows": found}


def test_what_counts_in_convergence_is_the_mean_over_the_tokens_of_the_last_steps():
    convergence = script("convergence")
    early = [{"loss": 9.0, "tokens": 5.0}] * (convergence.STEPS - convergence.LAST)
    late = [{"loss": 1.0, "tokens": 3.0}, {"loss": 2.0, "tokens": 1.0}] * (convergence.LAST // 2)
    assert convergence.last_loss([*early, *late]) == pytest.approx(1.25)
    assert convergence.last_loss(late) is None  # a run that did not come so far


def test_a_training_run_finds_its_row_of_the_paper_and_is_scaled_to_its_steps():
    def record(adapter, quant, dtype):
        config = {"adapter": {"name": adapter}, "quant": {"name": quant}, "dtype": dtype}
        readings = {"energy_per_step": Reading(3.6, "J/step", "nvml_counter")}
        return Record("train", config=config, readings=readings, counts={"optimizer_steps": 12})

    found = published.finetuning_counterpart(record("adalora", "nf4", "bfloat16"))
    assert found["name"] == "Q-AdaLoRA"
    assert published.finetuning_counterpart(record("lokr", "nf4", "bfloat16")) is None
    assert published.finetuning_counterpart(record("lora", "none", "bfloat16")) is None
    energy = published.scaled_training_energy(record("lora", "none", "float32"))
    assert (energy.value, energy.unit) == (pytest.approx(15.0), "Wh")
    assert energy.method == "nvml_counter, scaled from 12 steps to 15,000"


def test_the_handbook_keeps_the_rate_with_the_lower_loss(tmp_path):
    handbook = script("handbook")
    (tmp_path / handbook.RATES).write_text('{"0.001": 2.0, "0.003": null}')
    assert handbook.learning_rate("lora", tmp_path, []) == 0.001
    (tmp_path / handbook.RATES).write_text('{"0.001": 2.0, "0.003": 1.5}')
    assert handbook.learning_rate("lora", tmp_path, []) == 0.003


def test_a_kernel_of_a_profile_is_of_one_kind():
    kind = script("profiled").kind
    assert kind("triton_poi_fused__scaled_dot_product_flash_attention__to_copy_3") == "compiled, fused"
    assert kind("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>") == "attention"
    assert kind("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>") == "dequantization"
    assert kind("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT") == "matrix products"
    assert kind("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>") == "optimizer"
    assert kind("Memcpy DtoD (Device -> Device)") == "copies"
    assert kind("void at::native::reduce_kernel<512, 1>") == "elementwise, reductions and other"


def small_llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def test_what_a_batch_has_to_read_is_counted_token_by_token():
    model = small_llama()
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    found = script("batch").limit(model, [(3, 1), (5, 2)], [(2, 1), (1, 1)], "cpu")
    assert found["weight_bytes"] == pytest.approx(3 * 4 * weights, rel=0.05)  # three tokens in the longer; and buffers
    assert found["cache_bytes"] == ((3 + 4 + 6) + (5 + 8)) * 2 * 2 * 4 * 4
    assert found["seconds"] is None  # a copy's speed is measured on a GPU alone


@pytest.mark.parametrize("name", ["LoRA, rank 64", "LoKr, factored", "LoKr, PEFT"])
def test_a_contender_s_memory_is_free_for_the_next_even_where_it_is_kept_itself(name):
    lokr, base = script("lokr"), small_llama().to(torch.bfloat16)
    before = list(base.state_dict())
    kept = lokr.Contender(base, {**lokr.CONTENDERS[name], "r": 4})
    kept.step(torch.randint(0, 32, (2, 1, 5)), "cpu", torch.bfloat16)
    moments = [value for state in kept.optimizer.state.values() for value in state.values()]
    freed = [weakref.ref(tensor) for tensor in (*kept.parameters, *moments)]
    assert len(freed) > len(kept.parameters) > 0
    del moments
    kept.release()
    gc.collect()
    # The frames that the import of gptqmodel keeps hold the layer that was being made.
    assert sum(tensor() is not None for tensor in freed) <= 2 < len(freed)
    assert list(base.state_dict()) == before


def test_a_row_ends_with_the_script_that_measures_it(tmp_path):
    row, pid = tmp_path / "row.py", tmp_path / "pid"
    row.write_text(f"import os, pathlib, time\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\ntime.sleep(60)")
    runs = f"import rows, pathlib; rows.run_row('row', [{str(row)!r}], pathlib.Path({str(tmp_path)!r}), [])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    measuring = subprocess.Popen([sys.executable, "-c", runs], env=environment)
    number = wait_for(pid)
    measuring.terminate()
    assert measuring.wait(timeout=30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def wait_for(file: Path) -> int:
    for _ in range(600):
        if file.is_file() and file.read_text():
            return int(file.read_text())
        time.sleep(0.1)
    raise AssertionError("the row did not begin")
