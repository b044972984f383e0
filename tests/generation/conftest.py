from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_at_home.generation.static.slots import Slots


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def model(tiny_model: Path) -> Any:
    """The tiny model, with weights spread out so that greedy tokens vary and ties do not decide."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in loaded.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return loaded


@pytest.fixture(params=[False, True], ids=["", "ahead"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step is launched before the tokens of one are looked at, as on a GPU, or not."""
    made = Slots.__init__

    def init(self: Slots, *given: Any) -> None:
        made(self, *given)
        self.ahead = request.param

    monkeypatch.setattr(Slots, "__init__", init)
