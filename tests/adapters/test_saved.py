"""A saved adapter that goes on training is what the record says, and what cannot go on is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from llm_at_home.adapters import methods, saved
from llm_at_home.adapters.attach import OWN_KEYS
from llm_at_home.errors import Refusal

CONF = Path(__file__).resolve().parents[2] / "conf"
LORA = {"name": "lora", "trains": "adapter", "_target_": "peft.LoraConfig", "r": 64, "lora_alpha": 16}
LORA |= {"lora_dropout": 0.0, "target_modules": "all-linear"}
DORA = {**LORA, "name": "dora", "use_dora": True}
SAVED = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "use_dora": False}
SAVED |= {"target_modules": ["v_proj", "q_proj"], "init_lora_weights": True}


def completed(folder, group, named=(), **keys):
    (folder / "adapter_config.json").write_text(json.dumps({**SAVED, **keys}))
    config = {"adapter": dict(group), "adapter_path": str(folder)}
    saved.complete(config, named)
    return config["adapter"]


def test_the_settings_are_the_saved_adapter_s(tmp_path):
    found = completed(tmp_path, LORA, ["adapter.lora_alpha", "adapter.lora_dropout"], lora_alpha=16)
    assert found == {**LORA, "r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("group", "keys", "why"),
    [
        (LORA, {"peft_type": "LOKR"}, "use adapter=lokr"),
        (LORA, {"use_dora": True}, "use adapter=dora"),
        (LORA, {"init_lora_weights": "pissa"}, "use adapter=lora_pissa"),
        (DORA, {}, "use adapter=lora"),
        ({**LORA, "_target_": "peft.PrefixTuningConfig"}, {"peft_type": "PREFIX_TUNING"}, "only loads for use"),
        ({**LORA, "_target_": "peft.AdaLoraConfig"}, {"peft_type": "ADALORA"}, "use resume="),
    ],
)
def test_another_method_and_what_cannot_go_on_are_refused(tmp_path, group, keys, why):
    with pytest.raises(Refusal, match=why):
        completed(tmp_path, group, **keys)


def test_a_setting_that_the_user_named_is_not_changed_without_a_word(tmp_path):
    with pytest.raises(Refusal, match="r=4 and not 64"):
        completed(tmp_path, LORA, ["adapter.r"])


@pytest.mark.parametrize("name", ["lora", "lokr", "loha", "oft", "vera", "ia3", "bottleneck", "layernorm"])
def test_every_choice_knows_its_own_file(tmp_path, name):
    methods.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        group = OmegaConf.to_container(compose("train", [f"adapter={name}"]).adapter)
    options = {key: value for key, value in group.items() if key not in OWN_KEYS}
    instantiate(options, _convert_="object").save_pretrained(tmp_path)
    config = {"adapter": dict(group), "adapter_path": str(tmp_path)}
    saved.complete(config, [f"adapter.{key}" for key in group])
    assert config["adapter"] == group
