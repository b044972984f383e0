"""The map of the ranks that an adapter was left with."""

from __future__ import annotations

from llm_at_home.reporting import tables
from llm_at_home.reporting.load import load
from llm_at_home.reporting.ranks import rank_maps

PATTERN = {
    "layers.0.self_attn.q_proj": 4,
    "layers.1.self_attn.q_proj": 2,
    "layers.0.mlp.down_proj": 0,
    "layers.1.mlp.down_proj": 8,
}


def maps(make, save, runs, adapter):
    record = make.train(adapter={"name": "adalora"})
    record.adapter = adapter
    save(record, "a")
    table = next(t for t in tables.build(load([runs])) if t.key == "finetuning")
    return rank_maps(table)


def test_each_matrix_has_its_tile_by_layer_and_kind(make, save, runs) -> None:
    (drawn,) = maps(make, save, runs, {"rank_pattern": PATTERN})
    assert [kind for kind, _ in drawn.kinds] == ["q_proj", "down_proj"]
    assert [layer for layer, _ in drawn.layers] == ["0", "1"]
    shares = {tile.told: tile.share for tile in drawn.tiles}
    assert shares == {
        "layer 0, q_proj: rank 4": 0.5,
        "layer 1, q_proj: rank 2": 0.25,
        "layer 0, down_proj: rank 0": 0.0,
        "layer 1, down_proj: rank 8": 1.0,
    }
    columns = {tile.told.split(",")[0]: tile.x for tile in drawn.tiles}
    assert columns["layer 0"] < columns["layer 1"]
    assert drawn.description == "q_proj: 3.0 on average; down_proj: 4.0 on average"
    assert "up to 8" in drawn.note
    # The full colour is the dark one by day and the light one by night.
    assert "dark" not in drawn.note.lower()


def test_other_runs_have_no_map(make, save, runs) -> None:
    assert maps(make, save, runs, None) == ()


def test_a_pattern_of_another_shape_is_left_out(make, save, runs) -> None:
    assert maps(make, save, runs, {"rank_pattern": {"somewhere": 3, "layers.0.x": "three"}}) == ()
    assert maps(make, save, runs, {"rank_pattern": {"layers.0.q_proj": 0}}) == ()
