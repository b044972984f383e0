"""benchmarks/methods.py: every row is a configuration that both of its commands take."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from llm_at_home.quantization.naming import quant_words
from llm_at_home.tasks import resolve

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def methods():
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as when the script is run
    spec = importlib.util.spec_from_file_location("methods", ROOT / "benchmarks" / "methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_row_composes_for_both_commands_and_no_two_are_the_same(methods):
    seen = set()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for words in methods.METHODS.values():
            for (script, *options), _, _ in methods.HALVES.values():
                overrides = [*options, *words, "gpu=cpu"]
                config = resolve.resolve(script.removesuffix(".py"), compose(script.removesuffix(".py"), overrides))
            seen.add((*quant_words(config["quant"]), config["dtype"]))
    assert len(seen) == len(methods.METHODS)


def test_every_choice_that_a_cpu_can_run_has_a_row(methods):
    choices = {path.stem for path in (ROOT / "conf" / "quant").glob("*.yaml")}
    measured = {words[0].removeprefix("quant=") for words in methods.METHODS.values()}
    assert choices - measured == {"exl"}, "which needs a GPU"
