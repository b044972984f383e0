from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llm_at_home
from llm_at_home.records import hashing
from llm_at_home.records.hashing import config_hash, file_hash, folder_hash, package_versions

CONFIG: dict[str, Any] = {
    "seed": 0,
    "limit": None,
    "model": {"name": "tiny", "architecture": {"hidden_size": 64, "paths": "kept"}},
    "quant": {"bits": 4},
    "gpu": {"card": None},
    "paths": {"output": "/a"},
    "logger": {"tracking_uri": "sqlite:///a"},
    "rerun": False,
    "timeout_s": None,
}
INGREDIENTS = {"model": "m", "data": "d", "packages": {"torch": "2.13.0"}, "gpu": None}


def changed(path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    *folders, last = path.split(".")
    place = config
    for name in folders:
        place = place[name]
    place[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 1),
        ("limit", 3),
        ("model.name", "other"),
        ("model.architecture.hidden_size", 128),
        ("model.architecture.paths", "only the top level is left out"),
        ("quant.bits", 3),
        ("quant.bits", "4"),
        ("gpu.card", "NVIDIA H100"),
        ("new_key", 1),
    ],
)
def test_what_can_change_a_figure_changes_the_hash(path: str, value: Any) -> None:
    assert config_hash(changed(path, value), INGREDIENTS) != config_hash(CONFIG, INGREDIENTS)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("paths.output", "/b"),
        ("logger.tracking_uri", "http://host"),
        ("logger", None),
        ("rerun", True),
        ("timeout_s", 60),
        ("resume", True),
        ("strict", True),
        ("grace_s", 5),
        ("adapter_path", "/b"),  # named by path: its content is an ingredient
        ("answers", "/b"),
        ("baseline", "/b"),
    ],
)
def test_what_cannot_change_a_figure_leaves_the_hash(path: str, value: Any) -> None:
    assert config_hash(changed(path, value), INGREDIENTS) == config_hash(CONFIG, INGREDIENTS)


@pytest.mark.parametrize("key", list(INGREDIENTS))
def test_every_ingredient_changes_the_hash(key: str) -> None:
    assert config_hash(CONFIG, INGREDIENTS | {key: "other"}) != config_hash(CONFIG, INGREDIENTS)


def test_the_order_of_keys_does_not_matter() -> None:
    def turned(data: Any) -> Any:
        return {key: turned(data[key]) for key in reversed(list(data))} if isinstance(data, dict) else data

    assert config_hash(turned(CONFIG), turned(INGREDIENTS)) == config_hash(CONFIG, INGREDIENTS)


def test_the_hash_is_the_same_in_another_process_with_another_string_hash() -> None:
    script = f"from llm_at_home.records.hashing import config_hash\nprint(config_hash({CONFIG!r}, {INGREDIENTS!r}))"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        )
        assert done.stdout.strip() == config_hash(CONFIG, INGREDIENTS)
    assert len(config_hash(CONFIG, INGREDIENTS)) == 16


def test_versions_are_read_without_importing_and_absent_packages_left_out() -> None:
    versions = package_versions(["numpy", "no-such-package-at-all"])
    assert set(versions) == {"llm-at-home", "numpy"}
    assert versions["llm-at-home"] == llm_at_home.__version__
    script = "import sys\nfrom llm_at_home.records.hashing import package_versions\npackage_versions()\n"
    subprocess.run([sys.executable, "-c", f"{script}assert 'torch' not in sys.modules"], check=True)
    assert {"torch", "transformers", "peft", "bitsandbytes"} <= set(hashing.PACKAGES)


def test_file_and_folder_hashes_follow_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("x")
    (tmp_path / "b.txt").write_text("y")
    assert file_hash(tmp_path / "a.json") == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    first = folder_hash(tmp_path, ["*.json"])
    assert folder_hash(tmp_path, ["*.json", "a.*"]) == first
    (tmp_path / "b.txt").write_text("z")
    assert folder_hash(tmp_path, ["*.json"]) == first
    (tmp_path / "a.json").write_text("z")
    second = folder_hash(tmp_path, ["*.json"])
    (tmp_path / "a.json").rename(tmp_path / "c.json")
    assert len({first, second, folder_hash(tmp_path, ["*.json"])}) == 3


def test_a_path_within_a_group_leaves_the_hash_and_its_neighbours_stay():
    here = CONFIG | {"data": {"path": "/a/mine.jsonl", "max_length": 400}}
    there = CONFIG | {"data": {"path": "/b/mine.jsonl", "max_length": 400}}
    longer = CONFIG | {"data": {"path": "/a/mine.jsonl", "max_length": 500}}
    assert config_hash(here, INGREDIENTS) == config_hash(there, INGREDIENTS)
    assert config_hash(here, INGREDIENTS) != config_hash(longer, INGREDIENTS)
