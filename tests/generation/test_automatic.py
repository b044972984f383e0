"""engine=auto is, key for key, the engine that the device gets."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from llm_at_home.errors import Refusal
from llm_at_home.generation.automatic import engine_for

GROUP = Path(__file__).resolve().parents[2] / "conf" / "engine"


def choice(name):
    return OmegaConf.to_container(OmegaConf.load(GROUP / f"{name}.yaml"))


@pytest.mark.parametrize(("device", "name"), [("cuda", "graph"), ("cpu", "eager")])
def test_it_is_that_choice_of_the_group(device, name):
    assert engine_for(device, choice("auto")) == choice(name)


@pytest.mark.parametrize("own", [{"kernels": "torch"}, {"pages": 8}])
def test_what_is_the_graph_s_own_is_refused_without_one(own):
    with pytest.raises(Refusal, match="is of engine=graph"):
        engine_for("cpu", choice("auto") | own)
