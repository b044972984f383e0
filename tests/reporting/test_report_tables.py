"""What stands in the tables."""

import csv
from dataclasses import replace

import pytest

from llm_at_home.records.schema import Reading, Record
from llm_at_home.reporting import csvfile, facts, overview, tables
from llm_at_home.reporting.cells import EN_DASH, Column, number
from llm_at_home.reporting.load import load


@pytest.fixture
def table(runs):
    def build(key):
        return next(t for t in tables.build(load([runs])) if t.key == key)

    return build


def shown(row, key):
    return [entry.text for entry in row.cells[key].entries]


def reasons(row, key):
    return [entry.reason for entry in row.cells[key].entries]


def test_an_inference_row_holds_the_figures_of_its_record(make, save, table):
    save(make.infer(), "a")
    (row,) = table("inference").rows
    assert shown(row, "model") == ["smollm2_135m"]
    assert shown(row, "adapter") == ["none"]
    assert shown(row, "device") == ["Intel Xeon Platinum 8481C (2 cores)"]
    assert shown(row, "kernel") == ["Linear, torch cpu"]
    assert shown(row, "resident_set_peak") == ["1.05"]
    assert shown(row, "time_to_first_token") == ["0.413"]
    (decode,) = row.cells["decode_tokens_per_second"].entries
    assert (decode.text, decode.interval, decode.value) == ("25.3", "24.9–25.8", 25.34)


def test_memory_columns_are_those_that_the_devices_define(make, save, table):
    save(make.infer("cpu"), "cpu")
    keys = {c.key for c in table("inference").columns}
    assert "resident_set_peak" in keys
    assert not keys & set(facts.CUDA_MEMORY)
    save(make.infer("card", gpu="NVIDIA A100-SXM4-40GB", model="llama2_7b"), "card")
    both = table("inference")
    assert {c.key for c in both.columns} >= {*facts.CUDA_MEMORY, *facts.CPU_MEMORY}
    card = next(row for row in both.rows if shown(row, "model") == ["llama2_7b"])
    assert shown(card, "torch_allocated_peak") == ["5.22"]
    assert shown(card, "resident_set_peak") == [EN_DASH]
    assert "CPU" in reasons(card, "resident_set_peak")[0]


def test_an_unknown_figure_is_a_dash_with_the_records_own_reason(make, save, table):
    save(make.infer(), "a")
    made = table("inference")
    (row,) = made.rows
    assert shown(row, "energy_net") == [EN_DASH]
    assert row.cells["energy_net"].sort_value is None
    reason = "no energy counter: /sys/class/powercap is not readable"
    assert reasons(row, "energy_net") == reasons(row, "energy_gross") == [reason]
    assert list(made.footnotes).count(reason) == 1


def test_a_measured_zero_is_no_unknown(make, save, table):
    record = make.infer()
    record.readings["energy_net"] = make.reading(0.0, "Wh", "rapl")
    save(record, "a")
    (row,) = table("inference").rows
    assert shown(row, "energy_net") == ["0.00"]


def test_judges_stand_beside_the_run_that_they_judged(make, save, table):
    judged = make.infer("judged")
    save(judged, "a")
    save(make.infer("other", quant="nf4"), "b")
    save(make.judge(judged, "j1", "gpt4:single", 6.25), "j1")
    save(make.judge(judged, "j2", "local:single", 3.1), "j2")
    failed = make.judge(judged, "j3", "broken:single", 9.9)
    failed.status = "failed"
    save(failed, "j3")
    first, other = table("inference").rows
    entries = first.cells["judge_score"].entries
    assert [(e.label, e.text) for e in entries] == [
        ("gpt4:single, 2 missing", "6.25"),
        ("local:single, 2 missing", "3.10"),
    ]
    assert [e.source.parent.name for e in entries] == ["j1", "j2"]
    assert shown(first, "win_rate") == ["41.5", "41.5"]
    assert shown(other, "judge_score") == [EN_DASH]
    assert "evaluate.py task=judge" in reasons(other, "judge_score")[0]


def test_peoples_grades_stand_beside_the_run_that_they_are_of_and_nowhere_without_a_study(make, save, table):
    save(make.infer("graded"), "a")
    save(make.infer("other", quant="nf4"), "b")
    assert "human_grade" not in [column.key for column in table("inference").columns]
    models = [{"label": "m [bare]", "config_hash": "graded"}, {"label": "n", "config_hash": "of another run"}]
    quality = {f"human_grade/{model['label']}": make.reading(3.25, "points", "people", n=40) for model in models}
    save(Record("human", config={"models": models}, config_hash="study", quality=quality), "spring")
    made = table("inference")
    assert "human_grade" in [column.key for column in made.columns]
    first, other = made.rows
    assert [(e.label, e.text) for e in first.cells["human_grade"].entries] == [("spring", "3.25")]
    assert shown(other, "human_grade") == [EN_DASH]
    assert "make rate" in reasons(other, "human_grade")[0]


def test_a_finetuning_row_shows_quality_before_and_after(make, save, table):
    trained = make.train()
    folder = save(trained, "t").parent
    save(make.text(0.008, "before"), "before")
    save(make.text(0.954, "after", of=trained, folder=folder / "adapter"), "after")
    save(make.text(0.5, "elsewhere", model="llama2_7b"), "elsewhere")
    (row,) = table("finetuning").rows
    assert shown(row, "exact_match") == ["0.80", "95.4"]
    assert [e.label for e in row.cells["exact_match"].entries] == ["before", "after"]
    assert [e.source.parent.name for e in row.cells["exact_match"].entries] == ["before", "after"]
    assert row.cells["exact_match"].sort_value == pytest.approx(95.4)
    assert shown(row, "perplexity_home_bench") == ["14.21", "14.21"]
    assert shown(row, "trainable_parameters") == ["9,768,960"]
    assert shown(row, "steps") == ["100"]
    assert (shown(row, "loss_first"), shown(row, "loss_last")) == (["3.412"], ["0.087"])


@pytest.mark.parametrize("other", [{"quant": "nf4"}, {"model": "llama2_7b"}, {"data": {"name": "guanaco"}}])
def test_before_is_only_the_same_model_quantization_and_data(make, save, table, other):
    save(make.train(), "t")
    save(make.text(0.008, "before", **other), "before")
    (row,) = table("finetuning").rows
    assert shown(row, "exact_match") == [EN_DASH, EN_DASH]
    assert all(reasons(row, "exact_match"))


@pytest.mark.parametrize("other", [{"quant": "nf4"}, {"data": {"name": "guanaco"}}])
def test_after_on_other_data_or_bits_is_not_set_against_before(make, save, table, other):
    trained = make.train()
    folder = save(trained, "t").parent
    save(make.text(0.008, "before"), "before")
    save(make.text(0.954, "after", of=trained, folder=folder, **other), "after")
    (row,) = table("finetuning").rows
    assert shown(row, "exact_match") == ["0.80", EN_DASH]


def test_before_on_fewer_questions_is_no_before(make, save, table):
    trained = make.train()
    folder = save(trained, "t").parent
    save(make.text(0.008, "before", limit=8), "before")
    save(make.text(0.954, "after", of=trained, folder=folder), "after")
    (row,) = table("finetuning").rows
    assert shown(row, "exact_match") == [EN_DASH, "95.4"]
    assert "limit" in reasons(row, "exact_match")[0]


def test_a_stopped_run_does_not_claim_the_steps_it_planned(make, save, table):
    record = make.train()
    record.status, record.readings = "interrupted", {}
    save(record, "t")
    (row,) = table("finetuning").rows
    assert shown(row, "steps") == [EN_DASH]
    assert "interrupted" in row.marks
    assert "interrupted" in reasons(row, "steps")[0]


def test_the_adapter_of_an_inference_run_is_named_by_the_run_that_trained_it(make, save, table):
    folder = save(make.train(adapter={"name": "dora"}), "t").parent
    save(make.infer("known", adapter_path=str(folder / "checkpoints" / "adapter")), "a")
    save(make.infer("unknown", adapter_path="/elsewhere/runs/my-adapter"), "b")
    assert [shown(row, "adapter") for row in table("inference").rows] == [["dora"], ["runs/my-adapter"]]


def test_evaluations_list_judgments_made_and_missing(make, save, table):
    judged = make.infer()
    save(make.judge(judged, "j", missing=7), "j")
    save(make.text(0.9, "t"), "t")
    text_row, judge_row = table("evaluations").rows
    assert [shown(judge_row, key) for key in ("model", "quant", "on")] == [
        ["smollm2_135m"],
        ["none"],
        ["home_bench"],
    ]
    assert (shown(judge_row, "judgments"), shown(judge_row, "judgments_missing")) == (["48"], ["7"])
    assert shown(text_row, "judgments_missing") == [EN_DASH]
    assert [e.label for e in judge_row.cells["figures"].entries] == [
        "judge score mean",
        "judge score turn 1",
        "win rate",
    ]
    assert ("exact match", "90.0 %") in [(e.label, e.text) for e in text_row.cells["figures"].entries]


def test_unfinished_runs_show_status_and_the_first_line_of_the_error(make, save, table):
    record = make.infer()
    record.status, record.readings = "out_of_memory", {}
    record.error = {"type": "OutOfMemoryError", "message": "CUDA out of memory.\nTraceback ..."}
    path = save(record, "oom")
    save(make.infer("fine"), "fine")
    (row,) = table("unfinished").rows
    assert shown(row, "status") == ["out of memory"]
    assert shown(row, "error") == ["OutOfMemoryError: CUDA out of memory."]
    assert shown(row, "folder") == [str(path.parent)]
    gone = next(r for r in table("inference").rows if r.marks)
    assert "out of memory" in reasons(gone, "decode_tokens_per_second")[0]


def test_random_weights_and_emulated_cards_are_marked(make, save, table):
    model = {"name": "llama2_7b", "weights": "random"}
    record = make.infer(gpu="NVIDIA H100 80GB HBM3")
    record.config |= {"model": model, "gpu": {"name": "t4", "emulated": True}}
    save(record, "a")
    made = table("inference")
    (row,) = made.rows
    assert row.marks == (tables.RANDOM, tables.EMULATED)
    assert shown(row, "device") == ["t4 on NVIDIA H100 80GB HBM3"]
    assert any("random weights" in note for note in made.footnotes)
    assert "random" in reasons(row, "judge_score")[0]


@pytest.mark.parametrize(
    ("chosen", "card"),
    [
        ("a100_40gb", "NVIDIA A100-SXM4-40GB"),
        ("rtx4090", "NVIDIA GeForce RTX 4090"),
        ("auto", "Tesla T4"),
        ("cuda", "Tesla T4"),
    ],
)
def test_a_card_that_is_itself_is_not_emulated(make, chosen, card):
    record = make.infer(gpu=card)
    record.config["gpu"] = {"name": chosen, "card": card, "emulated": False}
    assert facts.emulated(record) is None


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ({"class": "bitsandbytes.nn.modules.Linear4bit", "version": "0.50.2"}, "Linear4bit, 0.50.2"),
        ({"layers": {"TorchAtenLinear": 210}}, "TorchAtenLinear × 210"),
        ({}, None),
    ],
)
def test_a_kernel_of_another_shape_is_still_told(make, kernel, said):
    assert facts.kernel(replace(make.infer(), kernel=kernel)) == said


def test_a_run_on_the_cpu_of_a_machine_with_cards_is_a_run_on_the_cpu(make):
    record = make.infer(gpu="Tesla T4")
    record.config["gpu"] = {"name": "auto", "device": "cpu"}
    assert facts.device(record).startswith("Intel")


def test_the_card_that_the_run_resolved_to_goes_before_those_present(make):
    record = make.infer(gpu="Tesla T4")
    record.provenance["gpu"] *= 2
    assert facts.device(record) == "Tesla T4 (2 present)"
    record.config["gpu"] = {"name": "auto", "device": "cuda", "card": "NVIDIA L4"}
    assert facts.device(record) == "NVIDIA L4"


def test_before_is_never_an_evaluation_of_another_run(make, save, table):
    save(make.train("t"), "t")
    other = make.text(0.9, "merged", of=make.train("u"))
    assert other.config["adapter_path"] is None
    save(other, "merged")
    (row,) = table("finetuning").rows
    assert shown(row, "exact_match") == [EN_DASH, EN_DASH]


def test_neither_before_nor_after_has_passages_in_its_prompt(make, save, table):
    trained = make.train("t")
    save(trained, "t")
    for name, options in (("bare", {}), ("tuned", {"of": trained, "folder": "t"})):
        save(make.text(0.9, name, text={"context": "all"}, **options), name)
    (row,) = table("finetuning").rows
    assert shown(row, "exact_match") == [EN_DASH, EN_DASH]
    save(make.text(0.1, "none", text={"context": "none"}), "none")
    save(make.text(0.8, "of", of=trained, folder="t", text={"context": "none"}), "of")
    (row,) = table("finetuning").rows
    assert shown(row, "exact_match") == ["10.0", "80.0"]


def test_a_record_that_says_nothing_is_still_a_row(save, table):
    for task in ("infer", "train", "evaluate"):
        save(Record(task, config_hash=task), task)
    for key in ("inference", "finetuning", "evaluations"):
        made = table(key)
        (row,) = made.rows
        assert shown(row, "model") == ["unknown"]
        for column in made.columns:
            for entry in row.cells[column.key].entries:
                assert entry.text, column.key
                assert bool(entry.reason) == (entry.value is None), column.key


@pytest.mark.parametrize("odd", [None, "text", 7, [], ["x"], {"name": {"nested": 1}}, {"name": None}])
def test_odd_shapes_in_the_config_do_no_harm(make, save, runs, odd):
    record = make.infer()
    for key in ("model", "quant", "gpu", "dtype", "adapter_path"):
        record.config[key] = odd
    record.provenance |= {"gpu": odd, "cpu": odd, "git": odd, "packages": odd}
    save(replace(record, kernel=odd, error=odd, subject=odd, status="failed"), "a")
    loaded = load([runs])
    assert len(tables.build(loaded)) == 2
    assert overview.summarize(loaded).machines


def test_a_unit_that_a_column_cannot_hold_is_said_and_not_shown_as_if_it_were(make, save, table):
    record = make.infer()
    record.readings["time_to_first_token"] = make.reading(412.7, "ms")
    record.readings["resident_set_peak"] = make.reading(999.0, "MiB")
    save(record, "a")
    (row,) = table("inference").rows
    assert shown(row, "time_to_first_token") == ["0.413"]
    assert shown(row, "resident_set_peak") == [EN_DASH]
    assert "999 MiB" in reasons(row, "resident_set_peak")[0]


@pytest.mark.parametrize(
    ("value", "decimals", "expected"),
    [
        (13.476, 2, "13.48"),
        (0.0312, 2, "0.031"),
        (0.00004, 2, "0.000040"),
        (0, 2, "0.00"),
        (-1.5, 1, "−1.5"),
        (3, 0, "3"),
        (9768960, 0, "9,768,960"),
        (5e20, 2, "5.00e+20"),
    ],
)
def test_numbers_keep_two_digits_that_mean_something(value, decimals, expected):
    assert number(value, decimals) == expected


def test_an_interval_is_scaled_with_its_value():
    column = Column("win_rate", "win rate", unit="%", decimals=1)
    entry = column.entry(Reading(0.4, "1", "judge", (0.3, 0.5), 10), None)
    assert (entry.text, entry.bounds) == ("40.0", (30.0, 50.0))
    assert "n = 10" in entry.detail


def test_the_csv_holds_plain_numbers_intervals_and_reasons(make, save, table, tmp_path):
    trained = make.train(model="=cmd()|calc")
    save(trained, "t")
    save(make.infer(), "a")
    with csvfile.write(table("inference"), tmp_path).open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["record"] == "multirun/a/record.json"
    assert float(row["decode_tokens_per_second [tokens/s]"]) == 25.34
    assert float(row["decode_tokens_per_second_low95 [tokens/s]"]) == pytest.approx(24.93)
    assert row["energy_net [Wh]"] == ""
    assert "powercap" in row["energy_net_reason"]
    with csvfile.write(table("finetuning"), tmp_path).open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["model"] == "'=cmd()|calc"
    assert row["exact_match_before [%]"] == ""
    assert row["exact_match_after_reason"]


def test_the_overview_names_machines_days_versions_and_commits(make, save, runs):
    save(make.infer("a"), "a")
    late = make.infer("b", gpu="NVIDIA H100 80GB HBM3", started_at="2026-11-22T10:00:00+00:00")
    late.provenance["git"]["dirty"] = True
    late.provenance["packages"] = {"torch": "2.14.0"}
    save(late, "b")
    save("{", "bad")
    said = overview.summarize(load([runs]))
    assert set(said.machines) == {
        "Intel Xeon Platinum 8481C (2 cores): 1 record",
        "NVIDIA H100 80GB HBM3: 1 record",
    }
    assert said.dates == "2026-11-20 to 2026-11-22"
    assert "torch 2.13.0 and 2.14.0" in said.versions
    assert set(said.commits) == {"0123456789ab", "0123456789ab with uncommitted changes"}
    assert said.tally == "2 records, 1 unreadable file"
