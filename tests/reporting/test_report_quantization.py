"""What each quantization costs and loses: the table, the plot, and what making a checkpoint leaves."""

import itertools
import random

import pytest

from llm_at_home.errors import Refusal
from llm_at_home.records.schema import Reading, Record
from llm_at_home.reporting import facts, readme, scatter, tables, write_report
from llm_at_home.reporting.cells import EN_DASH
from llm_at_home.reporting.load import load

RTN = {"name": "rtn", "method": "rtn", "bits": 4, "scheme": "asymmetric", "granularity": "group", "group_size": 64}


@pytest.fixture
def built(runs):
    return lambda: {table.key: table for table in tables.build(load([runs]))}


@pytest.fixture
def rows(built):
    return lambda: built()["quantization"].rows


@pytest.fixture
def plots(built):
    return lambda: scatter.plots(built()["quantization"])


def entry(row, key):
    (found,) = row.cells[key].entries
    return found


def test_a_row_holds_what_was_lost_and_what_the_same_model_cost(make, save, rows):
    ran = make.infer(quant=RTN)
    ran.readings |= {"load_time": make.reading(4.96, "s"), "make_time": make.reading(93.4, "s")}
    ran.kernel = {"linear": "RtnLinear", "backend": "torch cpu"}
    places = {"infer": save(ran, "i"), "fidelity": save(make.fidelity("q", 0.3314, RTN, 4.62), "q")}
    (row,) = rows()
    shown = {
        "quant": "rtn, 4 bits, groups of 64",
        "kernel": "RtnLinear, torch cpu",
        "make_time": "93",
        "load_time": "5.0",
        "bits_per_weight": "4.62",
        "resident_set_peak": "1.05",
        "decode_tokens_per_second": "25.3",
        "perplexity": "41.67",
        "perplexity_ratio": "1.212",
        "kl_divergence_mean": "0.3314",
        "kl_divergence_mean_detectable": "0.0123",
        "kl_divergence_p99": "1.391",
        "top1_agreement": "69.3",
        "kl_divergence_mean_own_answers": "0.3314",
    }
    assert {key: entry(row, key).text for key in shown} == shown
    assert entry(row, "top1_agreement").interval == "68.0–70.6"
    assert entry(row, "decode_tokens_per_second").source == places["infer"]
    assert entry(row, "kl_divergence_mean").source == places["fidelity"]


@pytest.mark.parametrize(
    "other",
    [
        {"quant": RTN | {"bits": 3}},
        {"quant": RTN | {"group_size": 32}},
        {"quant": RTN, "dtype": "bfloat16"},
        {"quant": RTN, "model": "llama2_7b"},
        {"quant": RTN, "model": {"name": "smollm2_135m", "weights": "random"}},
        {"quant": RTN, "gpu": "Tesla T4"},
        {"quant": RTN, "adapter_path": "runs/adapter"},
    ],
)
def test_the_cost_of_another_model_is_not_shown(make, save, rows, other):
    save(make.infer(**other), "i")
    save(make.fidelity("q", 0.3, RTN), "q")
    (row,) = rows()
    for key in ("decode_tokens_per_second", "resident_set_peak", "load_time"):
        assert entry(row, key).text == EN_DASH
        assert "no inference run" in entry(row, key).reason
    assert entry(row, "bits_per_weight").text == "4.50", "the fidelity run knows its size itself"
    assert entry(row, "kernel").text == "Linear, torch cpu"


def test_of_several_inference_runs_a_finished_one_in_small_batches_is_shown(make, save, rows):
    failed = make.infer("failed", quant=RTN, engine={"batch_size": 1})
    failed.status, failed.readings = "out_of_memory", {}
    save(failed, "failed")
    save(make.fidelity("q", 0.3, RTN), "q")
    (row,) = rows()
    assert "out of memory" in entry(row, "decode_tokens_per_second").reason
    late = "2026-11-21T10:00:00+00:00"
    save(make.infer("b16", quant=RTN, engine={"batch_size": 16}, started_at=late, decode=99.0), "b16")
    assert entry(*rows(), "decode_tokens_per_second").text == "99.0"
    save(make.infer("b1", quant=RTN, engine={"batch_size": 1}, decode=20.0), "b1")
    assert entry(*rows(), "decode_tokens_per_second").text == "20.0"
    save(make.infer("b1_late", quant=RTN, engine={"batch_size": 1}, started_at=late, decode=21.0), "b1_late")
    assert entry(*rows(), "decode_tokens_per_second").text == "21.0"


def test_what_was_not_made_says_so_and_is_no_zero(make, save, rows):
    save(make.infer(quant="nf4"), "i")
    save(make.fidelity("q", 0.26, {"name": "nf4"}), "q")
    (row,) = rows()
    for key in ("make_time", "checkpoint_size"):
        assert (entry(row, key).text, entry(row, key).value) == (EN_DASH, None)
        assert "loaded as they are" in entry(row, key).reason


def test_rows_are_sorted_by_divergence_within_a_model_and_the_unknown_last(make, save, rows):
    for i, divergence in enumerate((0.9, None, 0.0013, 0.26)):
        save(make.fidelity(f"q{i}", divergence, RTN | {"group_size": 16 * (i + 1)}), f"q{i}")
    save(make.fidelity("other", 0.1, RTN, model="another"), "other")
    said = [(entry(row, "model").text, entry(row, "kl_divergence_mean").text) for row in rows()]
    small = [("smollm2_135m", text) for text in ("0.0013", "0.2600", "0.9000", EN_DASH)]
    assert said == [("another", "0.1000"), *small]
    assert "not finite" in entry(rows()[-1], "kl_divergence_mean").reason


def test_a_row_that_stands_beside_no_other_is_marked(make, save, built):
    short = make.fidelity("short", 0.1, RTN, limit=4)
    redrawn = make.fidelity("redrawn", 0.2, RTN, fidelity={"answers_seed": 1})
    gguf = make.fidelity("gguf", 0.3, {"name": "gguf", "type": "Q4_K_M", "path": None})
    mean = gguf.quality["kl_divergence_mean"]
    gguf.quality["kl_divergence_mean"] = Reading(mean.value, mean.unit, f"{mean.method}/dequantized_weights")
    for record in (short, redrawn, gguf, make.fidelity("plain", 0.4, RTN)):
        save(record, record.config_hash)
    table = built()["quantization"]
    assert [row.marks for row in table.rows] == [(tables.SHORT,), (tables.REDRAWN,), (tables.DEQUANTIZED,), ()]
    assert len(table.footnotes.keys() & {table.mark_notes[mark] for row in table.rows for mark in row.marks}) == 3


def test_the_table_of_evaluations_has_the_four_figures_on_held_out_texts(make, save, built):
    save(make.fidelity("q", 0.0013, RTN), "q")
    (row,) = built()["evaluations"].rows
    assert entry(row, "on").text == "held-out texts"
    said = [(one.label, one.text) for one in row.cells["figures"].entries]
    divergences = [("KL mean", "0.0013 nats/token"), ("KL p99", "1.391 nats/token")]
    assert said == [("perplexity ratio", "1.212"), *divergences, ("top-1", "69.3 %")]


def test_a_failed_evaluation_keeps_its_row_and_says_why_it_is_empty(make, save, built):
    failed = make.fidelity("q", 0.3, RTN)
    failed.status, failed.quality, failed.readings = "timed_out", {}, {}
    save(failed, "q")
    (row,) = built()["quantization"].rows
    assert "timed out" in row.marks
    assert all(one.reason for cell in row.cells.values() for one in cell.entries if one.value is None)
    assert "timed out" in entry(row, "kl_divergence_mean").reason
    assert entry(row, "make_time").reason.startswith("no inference run")


def test_a_record_that_says_nothing_is_still_a_row(save, rows):
    save(Record("evaluate", config={"task": "fidelity"}), "a")
    (row,) = rows()
    assert entry(row, "quant").text == "unknown"
    assert all(bool(one.reason) == (one.value is None) for cell in row.cells.values() for one in cell.entries)


@pytest.mark.parametrize("odd", [None, "text", [], {"nested": 1}, True])
def test_odd_values_in_the_quantization_do_no_harm(make, save, built, odd):
    keys = ("bits", "target_bits", "granularity", "group_size", "type", "path", "scheme", "sym", "algorithm")
    for i in range(2):
        save(make.fidelity(f"q{i}", 0.3, {"name": "rtn", **dict.fromkeys(keys, odd)}), f"q{i}")
    assert len(built()["quantization"].rows) == 2
    assert len(scatter.plots(built()["quantization"])) <= 1


def test_making_a_checkpoint_is_no_inference(make, save, built, runs, tmp_path, capsys):
    """Neither of its own (make quantize) nor in a job's folder, where it is kept as ``making``."""
    made = Record("quantize", config=make.config(quant=RTN), config_hash="m")
    made.readings["decode_tokens_per_second"] = make.reading(1.0, "tokens/s")
    save(made, "job/making")
    assert built() == {}
    page = write_report([runs], tmp_path / "out")
    assert '<section id="runs"' not in page.read_text(encoding="utf-8")
    assert not [path for path in (tmp_path / "out").glob("*.csv") if path.stem in tables.KEYS]
    save(make.fidelity("q", 0.3, RTN), "job")
    (row,) = built()["quantization"].rows
    assert "no inference run" in entry(row, "decode_tokens_per_second").reason


def test_a_making_that_failed_stands_among_the_unfinished(make, save, built):
    made = Record("quantize", "failed", make.config(quant=RTN | {"bits": 3}), "m")
    made.error = {"type": "ValueError", "message": "no calibration text"}
    save(made, "job/making")
    assert list(built()) == ["unfinished"]
    (row,) = built()["unfinished"].rows
    said = [entry(row, key).text for key in ("task", "status", "quant", "error")]
    assert said == ["quantize", "failed", "rtn, 3 bits, groups of 64", "ValueError: no calibration text"]


def test_before_training_is_only_the_base_of_the_same_bits(make, save, built):
    save(make.train(quant=RTN), "t")
    save(make.text(0.008, "three", quant=RTN | {"bits": 3}), "three")
    (row,) = built()["finetuning"].rows
    assert [one.text for one in row.cells["exact_match"].entries] == [EN_DASH, EN_DASH]
    save(make.text(0.009, "four", quant=RTN), "four")
    (row,) = built()["finetuning"].rows
    assert [one.text for one in row.cells["exact_match"].entries] == ["0.90", EN_DASH]


def test_both_axes_of_the_plot_are_logarithmic(make, save, plots):
    for bits, divergence in ((2, 1.0), (4, 0.1), (8, 0.01)):
        save(make.fidelity(f"q{bits}", divergence, RTN | {"bits": bits}, float(bits)), f"q{bits}")
    (plot,) = plots()
    two, four, eight = plot.points
    assert four.x - two.x == pytest.approx(eight.x - four.x, abs=0.2)
    assert eight.x - four.x > 100
    assert four.y - two.y == pytest.approx(eight.y - four.y, abs=0.2)
    assert {tick.text: tick.at for tick in plot.x_ticks}["4"] == four.x
    assert {tick.text: tick.at for tick in plot.y_ticks}["0.1"] == four.y
    assert all(
        plot.left < point.x < plot.right and plot.top < point.high < point.low < plot.bottom for point in (four,)
    )


def test_what_a_logarithm_cannot_show_is_named(make, save, plots):
    save(make.fidelity("a", 0.0, {"name": "none"}, 32.0), "a")
    save(make.fidelity("b", 0.0018, {"name": "none"}, 16.0, dtype="bfloat16"), "b")
    save(make.fidelity("c", None, RTN | {"bits": 2}), "c")
    save(make.fidelity("d", 0.3, RTN), "d")
    (plot,) = plots()
    assert [point.label for point in plot.points] == ["rtn, 4 bits", "none, bfloat16"]
    assert "none, float32 (no divergence)" in plot.note
    assert "rtn, 2 bits (unknown)" in plot.note


def test_an_interval_down_to_zero_ends_at_the_axis(make, save, plots):
    for name, divergence in (("nf4", 0.003), ("fp4", 0.4)):
        record = make.fidelity(name, divergence, {"name": name})
        record.quality["kl_divergence_mean"] = Reading(divergence, "nats/token", "m", (0.0, 0.5), 40)
        save(record, name)
    (plot,) = plots()
    assert {point.low for point in plot.points} == {plot.bottom}
    assert all(plot.top < point.high < point.y < plot.bottom for point in plot.points)


def test_labels_hold_what_tells_the_points_apart(make, save, plots):
    gptq = {"name": "gptq", "bits": 4, "group_size": 64, "sym": True}
    for i, (quant, more) in enumerate(
        (
            (RTN, {}),
            (RTN | {"bits": 3}, {}),
            (gptq, {"dtype": "bfloat16"}),
            (gptq, {"dtype": "float16"}),
            (RTN, {"limit": 4}),
            ({"name": "gguf", "type": "Q4_K_M"}, {}),
        )
    ):
        save(make.fidelity(f"q{i}", 0.1 * (6 - i), quant, **more), f"q{i}")
    (plot,) = plots()
    assert [point.label for point in plot.points] == [
        "rtn, 4 bits",
        "rtn, 3 bits",
        "gptq, bfloat16",
        "gptq, float16",
        "rtn, 4 bits, fewer texts",
        "gguf",
    ]
    assert [point.marked for point in plot.points] == [False] * 4 + [True, False]


def test_of_one_quantization_the_newest_measurement_is_drawn(make, save, plots):
    save(make.fidelity("old", 0.5, RTN, started_at="2026-11-01T10:00:00+00:00"), "z")
    save(make.fidelity("new", 0.3, RTN), "a")
    save(make.fidelity("other", 0.9, RTN | {"bits": 3}), "b")
    (plot,) = plots()
    assert [point.told.split(" bits, ")[-1][:6] for point in plot.points] == ["0.9000", "0.3000"]


def test_models_and_devices_have_a_plot_each(make, save, plots):
    for model in ("one", "two"):
        for bits in (3, 4):
            save(make.fidelity(f"{model}{bits}", 1 / bits, RTN | {"bits": bits}, model=model), f"{model}{bits}")
    save(make.fidelity("three", 0.3, RTN, model="three"), "three")
    made = plots()
    assert [plot.title.split(": ")[1].split(",")[0] for plot in made] == ["one", "two"]
    assert len({plot.key for plot in made}) == 2


def test_labels_of_points_that_lie_together_do_not(make, save, plots):
    draw = random.Random(0)
    for i in range(40):
        divergence, bits = draw.choice((0.25, 0.26, 5.0)) * draw.uniform(0.99, 1.01), draw.uniform(4, 4.6)
        save(make.fidelity(f"q{i}", divergence, {"name": f"method {i}"}, bits), f"q{i}")
    (plot,) = plots()
    assert [point.y for point in plot.points] == sorted(point.y for point in plot.points)
    lines = [point.label_y for point in plot.points]
    assert min(b - a for a, b in itertools.pairwise(lines)) >= 15.9
    assert plot.top <= lines[0]
    assert lines[-1] <= plot.bottom


def test_a_page_below_the_root_has_tables_with_intervals(make, save, runs, tmp_path, capsys):
    (tmp_path / "pyproject.toml").touch()
    page = tmp_path / "docs" / "deep" / "page.md"
    page.parent.mkdir(parents=True)
    save(make.fidelity("q", 0.3, RTN), "q")
    block = "<!-- table: quantization multirun quant kl_divergence_mean:interval load_time:interval -->\n<!-- end -->\n"
    page.write_text(block)
    assert readme.main([str(page)]) == 0
    lines = page.read_text().splitlines()
    assert lines[1] == "| Quant | KL divergence, mean (nats/token) | loading (s) |"
    assert lines[3] == f"| rtn, 4 bits, groups of 64 | 0.3000 [0.2700, 0.3300] | {EN_DASH} |"
    with pytest.raises(Refusal, match="no column 'kl'"):
        readme.render(block.replace("load_time", "kl"), tmp_path)


def test_facts_name_a_quantization_by_what_matters(make):
    assert facts.quant_words(make.fidelity("q", 0.3, RTN)) == ("rtn", "4 bits", "groups of 64")
    assert facts.quant_words(make.infer(quant="none")) == ("none",)
    judged = make.judge(make.infer(quant=RTN), "j")
    assert facts.quant_words(judged) == ("rtn", "4 bits", "groups of 64"), "those of the run that was judged"
