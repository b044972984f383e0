"""make paper: which runs there are, what they will take, what is refused, and that a second command goes on."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from llm_at_home.errors import Refusal
from llm_at_home.records import store
from llm_at_home.records.schema import Reading, Record
from llm_at_home.reporting import published
from llm_at_home.tasks import launch
from llm_at_home.tasks.paper import evidence, listing, rows, summary
from llm_at_home.tasks.paper.__main__ import main
from llm_at_home.tasks.paper.estimate import estimate
from llm_at_home.tasks.paper.options import composed, read
from llm_at_home.tasks.paper.progress import AFTER, FINISHED, LEFT_OUT, REFUSED, RUN, Progress

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ("model=smollm2_135m", "gpu=cpu", "logger=none")
RANDOM = ("model.weights=random", "gpu=cpu")
H100 = {"name": "h100", "device": "cuda", "card": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0"}


@pytest.fixture
def progress(tmp_path):
    def make(*words):
        options = read([*words, f"paths.output={tmp_path}", f"out={tmp_path}/paper", f"study={tmp_path}/study"])
        return Progress(rows.runs(options), options)

    return make


def of(task, *words):
    """The plain configuration of a run, as on an H100."""
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(composed(task, words), resolve=True)
    dtype = "bfloat16" if config["dtype"] == "auto" else config["dtype"]
    return {**config, "gpu": H100, "dtype": dtype}


@pytest.mark.parametrize("only", [False, True])
def test_every_row_that_the_paper_published_is_among_the_runs(progress, only):
    runs = progress("protocol=paper", *(["rows=published"] if only else [])).planned
    found = [(run, composed(run.task, run.words)) for run in runs if run.kind in (rows.INFERENCE, rows.FINETUNING)]
    inferred = {(c.quant.name, c.dtype) for run, c in found if run.task == "infer"}
    trained = {(c.adapter.name, c.quant.name, c.dtype) for run, c in found if run.task == "train"}
    table1 = {(row["quant"], row["dtype"] or "auto") for row in published.table1()["rows"]}
    table3 = {(row["adapter"], row["quant"], row["dtype"] or "auto") for row in published.table3()["rows"]}
    assert table1 <= inferred
    assert table3 <= trained
    assert not only or (table1 == inferred and table3 == trained)


@pytest.mark.parametrize("protocol", ["", ",table1", ",small/inference"])
def test_rows_of_table_1_are_generate_s_in_every_protocol_and_llama_cpp_its_own(protocol):
    for row in ("none_float32", "nf4", "awq", "stock", "llamacpp"):
        engine = composed("infer", [f"experiment=[paper/{row}{protocol}]"]).engine.name
        assert engine == ("llamacpp" if row == "llamacpp" else "eager"), row


def test_the_protocol_follows_the_weights_and_the_device(progress, monkeypatch):
    assert rows.protocol_of(read(["model.weights=random"])) == "resources"
    assert rows.protocol_of(read(["model=smollm2_135m"])) == "small"
    assert rows.protocol_of(read(["protocol=paper", "model=smollm2_135m"])) == "paper"
    assert rows.protocol_of(read(["gpu=cpu"])) == "small"  # a 7B on MT-bench would take days there
    monkeypatch.setattr(rows, "resolve_device", lambda gpu: {"device": "cuda"})
    assert rows.protocol_of(read([])) == "paper"
    monkeypatch.undo()
    kinds = {run.kind for run in progress(*RANDOM).planned}
    assert kinds == {rows.INFERENCE, rows.FINETUNING}  # nobody judges random weights


def test_full_is_all_of_the_paper_s_steps_and_what_follows_from_them(progress):
    short = {run.name: run for run in progress("protocol=paper", "rows=[q_lora]").planned}
    whole = {run.name: run for run in progress("protocol=paper", "rows=[q_lora]", "full=true", "judge=gpt4").planned}
    assert composed("train", short["q_lora"].words).trainer.max_steps == 50
    assert composed("train", whole["q_lora"].words).trainer.max_steps == 15000
    assert short["q_lora_answers"].left_out == rows.NOT_FULL
    assert whole["q_lora_answers"].left_out is None
    assert "quant=nf4" in whole["q_lora_answers"].words
    assert whole["q_lora_answers_pairwise"].baselines == ("stock",)
    assert composed("evaluate", whole["q_lora_answers_single"].words).judge.name == "gpt4"


def test_weights_of_the_user_s_own_are_the_chat_model_s_or_the_base_s(progress):
    runs = progress("protocol=paper", "rows=[nf4,q_lora]", "chat_source=CHAT", "base_source=BASE", "judge=gpt4").planned
    found = {run.name: [word for word in run.words if word.startswith("model.source=")] for run in runs}
    assert found["nf4"] == ["model.source=CHAT"]
    assert found["q_lora"] == found["stock"] == found["q_lora_answers"] == ["model.source=BASE"]
    assert found["nf4_single"] == []


def test_gpt_4_is_asked_only_when_it_is_named(progress):
    judged = [run for run in progress("protocol=paper", "rows=[nf4]").planned if run.kind == rows.SINGLE]
    assert [run.left_out for run in judged] == [rows.NO_JUDGE]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rows=[nf5]"], "nf5 is unknown"),
        (["rows=nf4"], r"rows=\[nf4\]"),
        (["protocol=fast"], "choose auto"),
        (["quant=nf4"], "what a row decides"),
        (["nothing"], "key=value"),
        (["nokey=1"], "no run has such a key"),
        (["full=perhaps"], "neither true nor false"),
        (["judge=gpt5"], "choose auto, gpt4, local, server"),
        (["minutes=-3"], "leaves no time to start a run"),
        (["chat_source=5"], "is no folder's name"),
        (["model=llama9"], "Could not find 'model/llama9'"),
    ],
)
def test_what_makes_no_sense_is_refused(progress, words, said):
    with pytest.raises(Refusal, match=said):
        progress(*words)


def test_runs_are_not_kept_below_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([f"out={tmp_path}/file"]) == 2
    assert "is a file: name another" in capsys.readouterr().err


def test_a_refusal_of_the_command_is_one_line_and_exit_code_2(capsys):
    assert main(["rows=[nf5]"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_dry_run_lists_what_waits_what_is_refused_and_writes_nothing(progress, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch, "run_or_skip", lambda *job: pytest.fail("something was run"))
    found = progress(*EMBEDDED, "rows=[none_float32,nf4,q_lora]")
    states = {state.run.name: state for state in found.look()}
    assert states["nf4"].status == RUN
    assert (states["nf4_pairwise"].status, states["nf4_pairwise"].why) == (AFTER, "nf4, none_float32")
    assert states["q_lora_answers"].why == "q_lora"
    assert states["nf4"].estimate.record == "two_core_cpu/methods/nf4/infer"
    assert states["nf4"].estimate.energy.value is None
    assert "RAPL" in states["nf4"].estimate.energy.reason
    text = listing.as_text(list(states.values()))
    assert "11 of 11 runs are to run" in text
    assert "energy: unknown" in text
    words = [*EMBEDDED, "rows=[nf4]", f"paths.output={tmp_path}/other", "--dry-run"]
    assert main(words) == 0
    assert "to run" in capsys.readouterr().out
    assert not (tmp_path / "other").exists()


def test_a_refused_row_takes_what_follows_from_it_out(progress, monkeypatch):
    monkeypatch.setattr(launch, "run_or_skip", lambda *job: pytest.fail("something was run"))
    found = progress("protocol=small", *RANDOM, "rows=[llamacpp]")  # llama.cpp has no file of random weights
    states = {state.run.name: state for state in found.look()}
    assert states["llamacpp"].status == REFUSED
    assert (states["llamacpp_single"].status, states["llamacpp_single"].why) == (LEFT_OUT, "llamacpp is refused")
    assert found.run() == 0
    assert found.ended == {name: "refused" if name == "llamacpp" else "left out" for name in states}


def test_where_no_run_can_work_the_command_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch, "run_or_skip", lambda *job: pytest.fail("something was run"))
    words = ["protocol=small", *RANDOM, "rows=[llamacpp]", f"paths.output={tmp_path}"]
    for more in (["--dry-run"], []):
        assert main([*words, *more]) == 2
        said = capsys.readouterr()
        assert "llamacpp" in said.out
        assert said.err == "refused: no run of these can work, see above\n"
    assert main([*EMBEDDED, "rows=[llamacpp,nf4]", words[-1], "--dry-run"]) == 0


def test_help_shows_the_keys(capsys):
    assert main(["rows=[nf5]", "--help"]) == 0
    assert "minutes: null # start no run after so many" in capsys.readouterr().out


def test_an_override_that_one_row_does_not_take_refuses_that_row_alone(progress):
    states = {state.run.name: state for state in progress(*EMBEDDED, "rows=[lora,adalora]", "adapter.r=4").look()}
    assert states["lora"].status == RUN
    assert (states["adalora"].status, states["adalora"].why) == (REFUSED, "Could not override 'adapter.r'.")
    assert states["adalora_answers"].status == LEFT_OUT


def test_one_failure_does_not_stop_the_others_and_is_told(progress, monkeypatch):
    statuses = {"nf4": "failed", "int8": "out_of_memory"}

    def run(task, config, folder, parent):
        status = statuses.get(folder.name, "ok")
        record = Record(task, status, config, error={"type": "X", "message": "broke"} if status == "failed" else None)
        store.save(record, folder)
        return status, record

    monkeypatch.setattr(launch, "run_or_skip", run)
    found = progress(*EMBEDDED, "rows=[none_float32,nf4,int8]")
    assert found.run() == 1
    assert found.ended["none_float32_single"] == "ok"
    assert found.ended["nf4_single"] == found.ended["int8_single"] == "left out"
    assert "broke" in found.why["nf4"]


def test_an_interrupted_run_ends_the_command(progress, monkeypatch):
    monkeypatch.setattr(launch, "run_or_skip", lambda task, config, folder, parent: ("interrupted", None))
    found = progress(*EMBEDDED, "rows=[none_float32,nf4]")
    assert found.run() == 1
    assert found.ended == {"none_float32": "interrupted"}


def test_time_and_energy_of_an_h100_are_scaled_from_its_records():
    config = of("infer", "experiment=[paper/nf4,table1]")
    found = estimate("infer", config, needs_making=False)
    record = store.load(ROOT / "results" / str(found.record))
    assert record.config["engine"]["batch_size"] == 1
    joules = record.readings["energy_per_token"].value
    assert found.energy.value == pytest.approx(joules * 250 * 3 / 3600)  # three passes of an answer
    assert "scaled" in found.time.method
    assert found.memory.method == "predicted"
    assert found.memory.value == pytest.approx(record.readings["process_memory_peak"].value, rel=0.05)
    trained = estimate("train", of("train", "experiment=[paper/q_lora,table3]", "trainer.max_steps=100"), False)
    each = store.load(ROOT / "results" / str(trained.record)).readings["energy_per_step"].value
    assert trained.energy.value == pytest.approx(100 * each / 3600)


@pytest.mark.parametrize("name", ["infer nf4", "train q_lora"])
def test_the_same_run_again_is_estimated_to_take_as_long_starting_included(name):
    task, row = name.split()
    config = of(task, f"experiment=[paper/{row},{'table1' if task == 'infer' else 'table3'}]")
    found = estimate(task, config, needs_making=False)
    assert found.record == f"h100/paper_published/{row}"
    record = store.load(ROOT / "results" / found.record)
    assert found.time.value == pytest.approx(record.provenance["seconds"])
    known = record.readings["load_time"].value + record.readings["warmup_time"].value
    record.provenance.pop("seconds")  # a record that does not know it
    bare = evidence.Measured(record, found.record)
    pace = record.readings[evidence.RATES[task]].value
    units = 750 if task == "infer" else 12
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "committed", lambda results=None: (bare,))
        assert estimate(task, config, needs_making=False).time.value == pytest.approx(known + units / pace)


def test_what_no_record_tells_is_unknown_with_a_reason():
    found = estimate("infer", of("infer", "experiment=paper/gptq_2", "model=llama2_13b"), needs_making=True)
    assert found.time.value is None
    assert "no committed run" in found.time.reason
    assert found.disk["download of meta-llama/Llama-2-13b-hf"] == pytest.approx(26.0, rel=0.01)


def test_another_number_of_bits_is_no_evidence():
    config = of("infer", "experiment=[paper/gptq,table1]")
    assert evidence.nearest("infer", config).record.config["quant"]["bits"] == 4
    config["quant"]["bits"] = 3
    assert evidence.nearest("infer", config).place == "h100/paper/gptq_3"
    config["quant"]["bits"] = 5  # GPTQ has no such thing
    assert evidence.nearest("infer", config) is None


def test_what_is_scaled_to_the_paper_s_steps_is_apart_and_says_from_how_many(progress):
    record = store.load(ROOT / "results/h100/table3/lora_nf4")
    run = next(run for run in progress(*RANDOM).planned if run.name == "q_lora")
    row = summary.row(run, "ok", "", record, None)
    each = record.readings["energy_per_step"].value
    assert row.measured["energy_per_step"].value == each
    assert row.extrapolated["energy"].value == pytest.approx(each * 15000 / 3600)
    assert row.extrapolated["energy"].method.endswith("scaled from 12 steps to 15,000")
    assert not set(row.measured) & set(row.extrapolated)
    assert row.published["energy_wh"] == 7990
    whole = Record("train", "ok", record.config, readings=record.readings, counts={"optimizer_steps": 15000})
    assert summary.row(run, "ok", "", whole, None).extrapolated == {}


PUBLISHED = ROOT / "results/h100/paper_published"
PAGE = (ROOT / "docs/paper.md").read_text().splitlines()


def test_the_page_s_tables_of_the_h100_are_those_of_the_records(progress):
    planned = [run for run in progress(*RANDOM, "rows=published").planned if (PUBLISHED / run.name).is_dir()]
    assert len(planned) == len(list(PUBLISHED.glob("*/record.json"))) == 10
    made = summary.as_markdown(
        [summary.row(run, "ok", "", store.load(PUBLISHED / run.name), None) for run in planned]
    ).splitlines()
    tables = [line for line in made[: made.index("## Tables II and IV: people's grades, 1 to 5")] if line[:1] == "|"]
    assert len(tables) == 14
    assert [line for line in tables if line not in PAGE] == []
    kept = (PUBLISHED / summary.TEXT).read_text().splitlines()
    assert [line for line in tables if line not in kept] == []


def test_the_page_says_where_the_h100_s_time_went_and_what_other_hosts_gave():
    def found(folder):
        return {
            path.parent.name: store.load(path.parent) for path in (ROOT / "results/h100" / folder).glob("*/record.json")
        }

    def value(record, name):
        reading = record.readings.get(name)
        return reading.value if reading else 0.0

    ours, one, three = found("paper_published"), found("table1"), found("table3")
    earlier = json.loads((ROOT / "results/h100/paper/paper.json").read_text())["rows"]
    earlier = {
        row["run"]: row["measured"]["tokens_per_second"]["value"]
        for row in earlier
        if "tokens_per_second" in row["measured"]
    }
    expected = []
    for task, title in (("infer", "Table I, three answers of 250 tokens each"), ("train", "Table III, 12 steps each")):
        runs = [record for record in ours.values() if record.task == task]
        whole = sum(record.provenance["seconds"] for record in runs)
        warm, load, energy = (
            sum(value(record, name) for record in runs) for name in ("warmup_time", "load_time", "energy_gross")
        )
        timed = sum(
            value(record, "measured_time") or record.readings["steps_per_second"].n / value(record, "steps_per_second")
            for record in runs
        )
        seconds = [f"{each:.0f}" for each in (whole, timed, warm, load, whole - timed - warm - load)]
        expected.append(" | ".join([f"| {title}", str(len(runs)), *seconds, f"{energy:.1f} |"]))
    for name, record in ours.items():
        if record.task == "infer":
            speeds = [value(one[f"{name}_b1"], "decode_tokens_per_second"), earlier[name]]
            speeds.append(value(record, "decode_tokens_per_second"))
            expected.append(" | ".join([f"| {name}", "tokens/s", *(f"{each:.1f}" for each in speeds)]) + " |")
        else:
            adapter, base = record.config["adapter"]["name"], record.config["quant"]["name"]
            kind = f"{adapter}_nf4" if base == "nf4" else f"{name}_float32"
            before, now = (value(each, "steps_per_second") for each in (three[kind], record))
            expected.append(f"| {name} | steps/s | {before:.3f} | – | {now:.3f} |")
    assert [line for line in expected if line not in PAGE] == []


def test_grades_that_nobody_gave_are_unknown_beside_the_published_ones(progress):
    record = store.load(ROOT / "results/h100/table1/nf4_b1")
    run = next(run for run in progress(*RANDOM).planned if run.name == "nf4")
    grades = summary.row(run, "ok", "", record, None).grades
    assert grades["ours"]["value"] is None
    assert grades["ours"]["reason"] == "nobody has graded this yet"
    assert grades["published"]["mean"] == 2.9
    other = store.load(ROOT / "results/two_core_cpu/methods/gptq_3/infer")  # the paper's GPTQ has four bits
    beside = summary.row(run, "ok", "", other, None)
    assert (beside.published, beside.grades["published"]) == (None, None)
    study = Record("human", config={"models": [{"label": "A", "config_hash": record.config_hash}]})
    study.quality["human_grade/A"] = Reading(3.5, "points", "people", n=40)
    assert summary.row(run, "ok", "", record, study).grades["ours"]["value"] == 3.5


def test_make_s_own_dry_run_asks_for_the_list():
    def said(*words):
        # Not as a make below `make test`, which would say which folder it enters and leaves.
        plain = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
        return subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, env=plain).stdout

    assert "-m llm_at_home.tasks.paper model=x --dry-run" in said("-n", "paper", "PY=echo", "MODEL=x")
    # In a fresh clone, where the dry run skips what setup would do.
    assert "\nset up scripts/setup.py\n" in said("-n", "paper", "PY=/nowhere/python", "PYTHON=echo set up")
    assert said("-o", "setup", "paper", "PY=echo").splitlines()[-1] == "-m llm_at_home.tasks.paper"


@pytest.mark.slow
def test_rows_run_are_skipped_the_second_time_and_the_summary_tells_them(tmp_path, capsys):
    words = [*EMBEDDED, "rows=[none_float32,q_lora]", f"paths.output={tmp_path}", f"out={tmp_path}/paper"]
    words += ["trainer.max_steps=2", "data.max_length=48", "data.batch_size=2", "engine.max_new_tokens=4", "limit=1"]
    words[1:1] = ["study=" + str(tmp_path / "none")]
    try:
        assert main([*words, "adapter.r=4"]) == 0
    finally:
        said = capsys.readouterr()
    assert "## Table III" in said.out, said.err
    found = json.loads((tmp_path / "paper" / "paper.json").read_text())["rows"]
    kept = [row for row in found if row["status"] != summary.NOT_YET]
    assert {row["status"] for row in kept} == {"ok"}
    assert len(found) == 65
    by_name = {row["run"]: row for row in kept}
    assert by_name["q_lora"]["extrapolated"]["time"]["method"].endswith("scaled from 2 steps to 15,000")
    assert by_name["none_float32_single"]["measured"]["judge_score_mean"]["value"] > 0
    assert main([*words, "adapter.r=4"]) == 0
    assert f"0 of {len(kept)} runs are to run" in capsys.readouterr().out
    options = read([*words, "adapter.r=4"])
    assert {state.status for state in Progress(rows.runs(options), options).look()} == {FINISHED}
