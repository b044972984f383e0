"""AdaLoRA in the loop: the rank falls to its target on the run's own schedule, and a resumed run chooses the same."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from llm_at_home.adapters.attach import prepare_for_training, rank_schedule
from llm_at_home.errors import Refusal
from llm_at_home.records import store
from llm_at_home.training.callbacks.rank_allocation import RankAllocation

WORDS = (
    *("adapter=adalora", "adapter.target_r=2", "adapter.init_r=4", "adapter.lora_alpha=4"),
    *("data.batch_size=2", "callbacks.accumulation.steps=3", "optimizer.lr=1e-2", "limit=30"),
    *("trainer.max_steps=16", "rerun=true"),
)


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


def test_the_mean_rank_ends_at_the_target_and_a_resumed_run_ends_the_same(command, tmp_path):
    straight = tmp_path / "straight"
    done = command("train.py", *WORDS, "callbacks.checkpoints.every_n_steps=9", f"hydra.run.dir={straight}")
    assert done.returncode == 0, done.stderr
    record = record_of(straight)
    pattern = record["adapter"]["rank_pattern"]
    assert record["readings"]["rank_mean"]["value"] == sum(pattern.values()) / 14 == 2.0
    assert len(pattern) == 14
    assert len(set(pattern.values())) > 1, "the ranks were not chosen by importance"
    assert any(name.endswith("layers.0.mlp.down_proj") for name in pattern)
    # PEFT saves the kept directions alone.
    from safetensors.torch import load_file

    saved = load_file(straight / "adapter" / "adapter_model.safetensors")
    assert sum(len(t) for name, t in saved.items() if "lora_E" in name) == 14 * 2

    # The one checkpoint is in the middle of the lowering: that after step 9.
    assert [p.name for p in (straight / "checkpoints").glob("step_*")] == ["step_000009"]
    resumed = tmp_path / "resumed"
    done = command("train.py", *WORDS, f"resume={straight}", f"hydra.run.dir={resumed}")
    assert done.returncode == 0, done.stderr
    assert any("step_000009" in note for note in record_of(resumed)["notes"])
    assert record_of(resumed)["adapter"]["rank_pattern"] == pattern
    assert (resumed / "adapter" / "adapter_model.safetensors").read_bytes() == (
        straight / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_run_with_nothing_left_to_train_is_resumed_to_its_end(train_here, tiny_model, tmp_path):
    """As one that was stopped at its last step, or failed after it: on a full disk, say."""
    words = [*WORDS, "model=custom", f"model.source={tiny_model}", "trainer.max_steps=6", "limit=6"]
    words += ["callbacks.checkpoints.every_n_steps=6", "callbacks.accumulation.steps=1"]
    first = train_here(words, tmp_path / "first")
    store.save(first, tmp_path / "first")
    again = train_here([*words, f"resume={tmp_path}/first"], tmp_path / "again")
    assert again.adapter == first.adapter
    assert again.readings["gradient_norm_median"].value == first.readings["gradient_norm_median"].value
    for name in ("adapter/adapter_model.safetensors", "metrics.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


ADALORA = {
    "name": "adalora",
    "trains": "adapter",
    "_target_": "peft.AdaLoraConfig",
    "task_type": "CAUSAL_LM",
    "target_r": 2,
    "init_r": 4,
    "target_modules": "all-linear",
    "schedule": {"initial": 0.1, "final": 0.3},
}


class Trainer:
    """What the callback looks at."""


class Module:
    def __init__(self, model):
        self.model = model
        self.penalty = self.after_optimizer_step = None
        self.device = torch.device("cpu")


@pytest.fixture
def allocation(tiny_model):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    callback, module = RankAllocation(), Module(prepare_for_training(base, ADALORA, steps=20))
    callback.on_fit_start(Trainer(), module)
    return callback, module


def test_the_penalty_is_peft_s(allocation):
    callback, module = allocation
    ids = torch.arange(30, 60).reshape(1, 30)
    with torch.no_grad():
        # PEFT adds it to the losses that the model computes.
        with_penalty = module.model(input_ids=ids, labels=ids).loss
        module.model.peft_config["default"].orth_reg_weight = 0.0
        without = module.model(input_ids=ids, labels=ids).loss
    assert callback.penalty() is None
    module.model.peft_config["default"].orth_reg_weight = 0.5
    assert float(callback.penalty()) == pytest.approx(float(with_penalty - without), rel=1e-3)
    assert module.penalty == callback.penalty


class OneByOne(RankAllocation):
    """The penalty as a term of the objective, matrix by matrix."""

    def penalty(self):
        config, norms = self._config, []
        for name, parameter in self._model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                product = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
                norms.append(torch.linalg.norm(product - torch.eye(len(product))))
        (config.orth_reg_weight * torch.stack(norms).mean()).backward()


def precision(name):
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0) if name == "16-mixed" else None
    return [MixedPrecision(name, "cpu", scaler)] if name != "32-true" else None


@pytest.mark.parametrize("name", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_run_is_the_one_with_peft_s_own_loops(fit, name, tmp_path):
    adamw = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    order = {"batch_size": 2, "accumulate": 3, "steps": 14, "lengths": (5, 40, 12, 33, 21, 17), "optimizer": adamw}
    ends = []
    for callback, implementation in ((OneByOne(), "peft"), (RankAllocation(), "factored")):
        adapter = {**ADALORA, "implementation": implementation}
        module = fit(
            **order,
            callbacks=[callback],
            prepare=lambda model, adapter=adapter: prepare_for_training(model, adapter, steps=14),
            plugins=precision(name),
            folder=tmp_path / implementation,
        )
        ends.append((module, callback.ranks()))
    (wanted, ranks), (found, ours) = ends
    assert sum(ranks.values()) == 14 * 2
    assert ours == ranks
    assert [s["loss"] for s in found.history] == pytest.approx([s["loss"] for s in wanted.history], rel=1e-4)
    for key, value in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value, rtol=1e-2, atol=1e-4, msg=key)


def test_other_adapters_are_left_alone(tiny_model):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    lora = {"name": "lora", "trains": "adapter", "_target_": "peft.LoraConfig", "target_modules": "all-linear"}
    callback, module = RankAllocation(), Module(prepare_for_training(base, lora))
    callback.on_fit_start(Trainer(), module)
    assert module.penalty is None
    assert module.after_optimizer_step is None
    assert callback.readings() == {}
    assert callback.adapter_facts() == {}
    assert callback.state_dict() == {}


def test_before_the_first_allocation_the_rank_is_unknown(allocation):
    callback, _ = allocation
    assert callback.readings()["rank_mean"].value is None
    assert callback.adapter_facts() == {}


def test_the_schedule_counts_the_steps_of_the_run():
    shares = {"initial": 0.1, "final": 0.3}
    assert rank_schedule(shares, 100) == {"total_step": 100, "tinit": 10, "tfinal": 30}
    assert rank_schedule(shares, 8)["tinit"] == 2
    with pytest.raises(Refusal, match="more steps"):
        rank_schedule(shares, 3)
    with pytest.raises(Refusal, match=r"trainer\.max_steps"):
        rank_schedule(shares, None)
