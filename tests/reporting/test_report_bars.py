"""The names of bars, outlines and axes: each run's own, also where it is cut to a phone's width."""

import pytest

from llm_at_home.reporting.figures import charts, shortened
from llm_at_home.reporting.load import load
from llm_at_home.reporting.radar import radars
from llm_at_home.reporting.tables import build

LONG = "somebody/a-model-of-seven-billion-with-a-very-long-name-of-its-own"


@pytest.fixture
def chart(make, save, runs):
    def draw(**changes):
        for i, (batch, seed, model) in enumerate(zip(*changes.values(), strict=True)):
            engine = {"name": "eager", "batch_size": batch}
            save(make.infer(f"run-{i}", decode=30.0 - i, engine=engine, seed=seed, model=model), f"{i}")
        (table,) = build(load([runs]))
        return next(one for one in charts(table) if one.key == "inference-decode_tokens_per_second")

    return draw


def test_runs_of_a_sweep_over_batches_and_seeds_are_told_apart(chart):
    models = ["tiny"] * 4
    drawn = chart(batch=[1, 2, 2, 4], seed=[0, 0, 1, 0], model=models)
    said = ["none · float32 · batch 1", "none · float32 · batch 2 · seed 0", "none · float32 · batch 2 · seed 1"]
    assert [bar.label for bar in drawn.bars] == [*said, "none · float32 · batch 4"]
    assert [row[0] for row in drawn.data.rows] == [bar.label for bar in drawn.bars]


def test_engines_are_told_apart(make, save, runs):
    for name in ("eager", "graph"):
        save(make.infer(name, engine={"name": name, "batch_size": 1}), name)
    drawn = charts(build(load([runs]))[0])
    assert sorted(bar.label for bar in drawn[-1].bars) == ["none · float32 · eager", "none · float32 · graph"]


def test_a_long_model_name_hides_nothing_that_stands_behind_it(chart):
    models = [LONG] * 2 + ["tiny"]
    drawn = chart(batch=[1, 2, 1], seed=[0, 0, 0], model=models)
    assert [bar.label.rpartition("batch ")[2] for bar in drawn.bars[:2]] == ["1", "2"]
    assert all(len(bar.label) <= 48 for bar in drawn.bars)
    assert drawn.data.rows[0][0].startswith(LONG)
    assert LONG in drawn.description


def test_names_that_are_cut_to_the_same_have_a_number():
    cut = shortened(["x" * 60 + "a · nf4", "x" * 60 + "b · nf4", "y"], 24)
    assert cut == [f"{i}. {'x' * 14}… · nf4" for i in (1, 2)] + ["y"]


def test_the_device_is_what_goes_first(make, save, runs):
    for i, gpu in enumerate([None, "NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"]):
        save(make.infer(f"{i}", gpu, model=LONG, engine={"batch_size": 16 * i}, adapter_path="/a/lora"), f"{i}")
        save(make.infer(f"{i}-tiny", gpu, model="tiny", engine={"batch_size": 1}), f"{i}-tiny")
    drawn = charts(build(load([runs]))[0])[-1]
    assert all("batch 16 · N" in bar.label for bar in drawn.bars if LONG[:5] in bar.label and "16" in bar.label)
    assert "tiny · none · float32 · NVIDIA H100 80GB HBM3" in {bar.label for bar in drawn.bars}


def test_a_category_of_one_s_own_is_cut_where_the_radar_ends(make, save, runs):
    of = make.infer("answers")
    judged = make.judge(of, "judged")
    names = ["humanities", "home automation and appliances", "coding", "stem and the other natural sciences"]
    judged.quality |= {f"judge_score_{name}": make.reading(5.0, "points", "gpt4:single") for name in names}
    save(judged, "judged")
    (drawn,) = (one for table in build(load([runs])) for one in radars(table) if "score" in one.key)
    assert [axis.name for axis in drawn.axes] == ["coding", "home auto…", "humanities", "stem and …"]
    assert drawn.data.header[2] == "home automation and appliances, points"
