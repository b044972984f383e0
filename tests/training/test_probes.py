"""Packing and logits in parts are tried on the model at hand: several architectures pass, others are refused."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from llm_at_home.errors import Refusal
from llm_at_home.models.chat import Encoded
from llm_at_home.models.logits import capped_logits
from llm_at_home.tasks import resolve
from llm_at_home.training.activations import ChunkedLoss
from llm_at_home.training.data import collate, pack
from llm_at_home.training.module import CausalLMModule
from llm_at_home.training.probes import check_head, check_packing

SHAPE = {
    **{"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
IDS = list(range(20, 36))


def model_of(kind, **options):
    torch.manual_seed(0)
    shape = {key: value for key, value in SHAPE.items() if kind != "opt" or key != "head_dim"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shape, **options})).float().train()


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = CausalLMModule(model, functools.partial(torch.optim.SGD, lr=0.1)).training_step(batch, 0)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("qwen2", {}), ("mistral", {"sliding_window": 6}), ("gemma2", {"sliding_window": 6}), ("phi3", {})],
)
def test_packing_keeps_conversations_apart_on_other_architectures(kind, options):
    model = model_of(kind, **options)
    check_packing(model, IDS, "float32")
    rows = [Encoded(row, row, truncated=False) for row in ([*IDS], [40, 41, 42], [50, 51, 52, 53, 54, 55, 56, 57, 58])]
    wanted_loss, wanted = loss_and_gradients(model, collate(rows, pad_id=0))
    loss, found = loss_and_gradients(model, pack(rows))
    torch.testing.assert_close(loss, wanted_loss)
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["mamba", "bloom", "opt"])  # a recurrence, ALiBi, positions of its own counting
def test_an_architecture_that_lets_conversations_see_each_other_is_refused(kind):
    with pytest.raises(Refusal, match=r"does not keep packed conversations apart.*use data.packing=false"):
        check_packing(model_of(kind), IDS, "float32")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "cohere", "granite"])  # two with a factor
def test_an_output_layer_that_ends_the_model_passes(kind):
    model = model_of(kind, **({"logits_scaling": 8.0} if kind == "granite" else {}))
    check_head(model, ChunkedLoss(model, 4), IDS, "float32")
    assert model.training


def test_what_comes_after_the_output_layer_is_found_also_where_no_key_says_so():
    class Capped(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = torch.tanh(output.logits)
            return output

    model = Capped(AutoConfig.for_model("llama", **SHAPE))
    with pytest.raises(Refusal, match=r"Capped does something to its logits.*use memory.loss_tokens=null"):
        check_head(model, ChunkedLoss(model, 4), IDS, "float32")


@pytest.mark.parametrize("kind", ["gemma2", "recurrent_gemma"])
def test_a_known_one_is_refused_before_anything_loads(kind, tmp_path, resolved):
    AutoConfig.for_model(kind, **SHAPE).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")  # never read
    words = ["model=custom", f"model.source={tmp_path}"]
    resolve.check("train", resolved(words))
    with pytest.raises(Refusal, match="caps its logits after the output layer") as refused:
        resolve.check("train", resolved([*words, "memory=smallest"]))
    assert "\n" not in str(refused.value)
    shape = json.loads((tmp_path / "config.json").read_text())
    assert capped_logits(shape) == capped_logits({"text_config": shape})


def test_a_cap_that_a_configuration_leaves_out_is_known():
    assert capped_logits({"model_type": "gemma2"}) == "final_logit_softcapping"
    assert capped_logits({"model_type": "gemma2", "final_logit_softcapping": None}) is None
    assert capped_logits({"model_type": "llama"}) is None
    assert capped_logits({}) is None
