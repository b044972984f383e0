"""Passes as graphs: what is replayed trains as what is not, and what cannot be captured is not."""

from __future__ import annotations

import functools

import pytest
import torch
from peft import LoKrConfig, LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

from llm_at_home.tasks import fast
from llm_at_home.tasks.train import _redrawn
from llm_at_home.training import activations, regional
from llm_at_home.training import module as modules
from llm_at_home.training.callbacks.clipping import GradientClipping
from llm_at_home.training.graphed import GraphedPasses
from llm_at_home.training.probes import draws_numbers
from llm_at_home.training.shapes import Shapes

LENGTHS = (5, 40, 12, 33, 21, 17, 9)
CARD = {"device": "cuda", "card": "NVIDIA A100", "emulated": False, "compute_capability": "8.0"}
ADAMW = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)


class Tape:
    """Records as a card does: nothing runs while it is captured; a replay reads and writes where the capture did."""

    def __init__(self, fails: str | None = None) -> None:
        self.fails = fails
        self.ran = self.captured = self.replayed = self.let_go_of = 0

    def run(self, function):
        self.ran += 1
        return function()

    def capture(self, function):
        if self.fails:
            raise RuntimeError(self.fails)
        self.captured += 1
        found = torch.zeros(())

        def replay():
            self.replayed += 1
            found.copy_(function())

        return replay, found

    def let_go(self):
        self.let_go_of += 1


@pytest.fixture
def with_tape(monkeypatch):
    """Every module's passes are graphs of this tape."""

    def use(tape):
        made = modules.CausalLMModule.__init__

        def init(self, *args, **kwargs):
            made(self, *args, **kwargs)
            self.graph_passes(tape)

        monkeypatch.setattr(modules.CausalLMModule, "__init__", init)
        return tape

    return use


@pytest.mark.parametrize(("accumulate", "recomputed"), [(1, "none"), (2, "none"), (2, "full")])
def test_a_graph_trains_as_the_passes_do(fit, with_tape, accumulate, recomputed):
    def recomputing(model):
        activations.checkpoint_layers(model, recomputed, captured=True)
        return model

    order = {"batch_size": 2, "accumulate": accumulate, "steps": 5, "lengths": LENGTHS, "optimizer": ADAMW}
    order["shapes"] = Shapes(rows=2, longest=40, lengths=2)
    wanted = fit(**order)
    tape = with_tape(Tape())
    found = fit(**order, prepare=recomputing)
    assert found.history == wanted.history
    for name, value in found.state_dict().items():
        assert torch.equal(value, wanted.state_dict()[name])
    # Each of the two shapes once as it is, and again from the graph; the second shape took the first one's graph away.
    assert tape.ran == 2
    assert tape.replayed == 5 * accumulate - 2
    assert 2 <= tape.captured <= 3
    assert all(p.grad is not None and not p.grad.any() for p in found.model.parameters())


@pytest.mark.parametrize("scale", [2.0**10, 2.0**40])
def test_a_graph_brings_the_scaler_s_factor_in(fit, with_tape, half_precision, scale):
    order = {"batch_size": 2, "accumulate": 2, "steps": 4, "lengths": LENGTHS, "optimizer": ADAMW}
    order |= {"shapes": Shapes(rows=2, longest=40, lengths=1), "callbacks": [GradientClipping(0.3)]}
    plugins = [half_precision(scale), half_precision(scale)]
    wanted = fit(**order, plugins=plugins[0])
    with_tape(Tape())
    found = fit(**order, plugins=plugins[1])
    assert found._graphed.counts() == {"graphed_shapes": 1}
    assert [s["loss"] for s in found.history] == [s["loss"] for s in wanted.history]
    norms = [[s["gradient_norm"] for s in module.history] for module in (found, wanted)]
    assert norms[0] == pytest.approx(norms[1], nan_ok=True)
    scales = [plugin.scaler.get_scale() for (plugin,) in plugins]
    assert scales[0] == scales[1]
    assert (scales[0] < scale) == (scale > 2.0**20)  # such gradients overflow: the step is left out, the factor halved
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, wanted.state_dict()[name])


def test_a_new_shape_takes_the_memory_of_the_graphs():
    weight = torch.nn.Parameter(torch.ones(3))

    def passes(batch):
        loss = (weight * batch["input_ids"].sum()).sum()
        loss.backward()
        return loss.detach()

    def batch(length, value):
        return {key: torch.full((1, length), value) for key in ("input_ids", "labels")}

    tape = Tape()
    graphed = GraphedPasses(passes, [weight], tape)
    summed = 0
    for length, value in [(2, 1), (2, 2), (2, 3), (4, 1), (2, 4), (4, 5)]:
        assert graphed(batch(length, value)) == 3 * length * value
        summed += length * value
    assert weight.grad.tolist() == [summed] * 3
    assert (tape.ran, tape.captured, tape.replayed, tape.let_go_of) == (2, 3, 4, 1)
    assert graphed.counts() == {"graphed_shapes": 2}
    place = weight.grad.data_ptr()
    graphed.clear_gradients()
    assert weight.grad.tolist() == [0, 0, 0]
    assert weight.grad.data_ptr() == place
    graphed.close()
    assert tape.let_go_of == 2


def test_what_cannot_be_captured_runs_as_it_is(fit, with_tape):
    order = {"batch_size": 2, "accumulate": 1, "steps": 4, "lengths": LENGTHS, "optimizer": ADAMW}
    order["shapes"] = Shapes(rows=2, longest=40, lengths=1)
    wanted = fit(**order)
    tape = with_tape(Tape(fails="operation not permitted when stream is capturing\nCompile with"))
    found = fit(**order)
    assert found.history == wanted.history
    assert (tape.ran, tape.replayed, tape.let_go_of) == (1, 0, 1)
    assert found._graphed.counts() == {"graphed_shapes": 0}
    assert found._graphed.notes() == ["no CUDA graph of the passes: operation not permitted when stream is capturing"]


def test_a_batch_without_a_mask_asks_the_device_nothing(monkeypatch):
    def asked(position_ids):
        raise AssertionError("a GPU would be waited for")

    model = adapted()
    batch = {"input_ids": torch.arange(3, 15).reshape(2, 6)}
    wanted = model(**batch, attention_mask=torch.ones((2, 6))).logits
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", asked)
    torch.testing.assert_close(activations.logits(model, batch), wanted)
    assert masking_utils.find_packed_sequence_indices is asked
    packed = {**batch, "position_ids": torch.arange(6).repeat(2, 1)}
    with pytest.raises(AssertionError, match="waited"):
        activations.logits(model, packed)


def test_passes_that_fit_go_on_where_their_graph_does_not():
    class Full(Tape):
        def capture(self, function):
            raise torch.OutOfMemoryError("out of memory")

    tape = Full()
    graphed = GraphedPasses(lambda batch: batch["labels"].sum(), [], tape)
    batch = {key: torch.ones((1, 2)) for key in ("input_ids", "labels")}
    assert [float(graphed(batch)) for _ in range(3)] == [2.0] * 3
    assert tape.let_go_of == 1
    assert graphed.notes() == ["no CUDA graph of the passes: out of memory"]


@pytest.mark.parametrize(
    ("adapter", "model", "draws"),
    [
        ({}, {}, False),
        ({"lora_dropout": 0.1}, {}, True),
        ({}, {"attention_dropout": 0.1}, True),
        ({"module_dropout": 0.1}, {}, True),  # PEFT draws it on the host
    ],
)
def test_what_draws_numbers_is_found_out(adapter, model, draws):
    made = adapted(LoKrConfig if "module_dropout" in adapter else LoraConfig, model, **adapter).eval()
    before = torch.get_rng_state()
    assert draws_numbers(made, list(range(3, 40))) is draws
    assert torch.equal(torch.get_rng_state(), before)
    assert not made.training


def test_what_is_recomputed_is_captured_unless_it_draws_numbers():
    memory = {"checkpointing": "full", "loss_tokens": None}
    ids = list(range(3, 40))
    assert _redrawn(memory, adapted(), ids) is None
    assert "random states" in _redrawn(memory, adapted(lora_dropout=0.1), ids)
    parts = {"checkpointing": "none", "loss_tokens": 8}
    assert "random states" in _redrawn(parts, adapted(lora_dropout=0.1), ids)
    assert _redrawn({**parts, "loss_tokens": None}, adapted(lora_dropout=0.1), ids) is None


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], None),
        (["trainer.padded_lengths=null", "trainer.compile=off"], "length of its own"),
        (["data.packing=true"], "packed"),
        (["memory.checkpointing=full", "memory.loss_tokens=64"], None),
        (["memory.checkpointing=full", "memory.offload=true", "trainer.compile=off"], "offloaded"),
        (["trainer.precision=16-mixed"], None),
        (["trainer.devices=2", "trainer.strategy=ddp"], "several processes"),
        (["adapter=none"], "nothing is trained"),
    ],
)
def test_why_passes_are_not_captured(resolved, words, why):
    config = resolved(["trainer=fast", "trainer.micro_batch=null", *words], **CARD)
    assert config["trainer"]["graph"] == "auto"
    found = fast.graph_obstacle(config)
    assert found is None if why is None else why in found
    config["gpu"]["device"] = "cpu"
    assert fast.graph_obstacle(config) == "there is no GPU"


def test_the_record_says_that_there_was_no_graph(train_here, tiny_model, tmp_path):
    words = ["trainer=fast", "trainer.compile=off", "trainer.micro_batch=null", "trainer.max_steps=1", "data=synthetic"]
    words += ["model=custom", f"model.source={tiny_model}", "data.max_length=32", "limit=4"]
    record = train_here(words, tmp_path / "run")
    assert "no CUDA graph of the passes: there is no GPU" in record.notes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are a GPU's")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_card_s_graph_adds_the_gradients_that_the_passes_do(compiled, recomputed):
    losses, gradients = {}, {}
    for graph in (False, True):
        model = adapted().cuda().train()
        loss = activations.ChunkedLoss(model, 16, captured=graph) if recomputed else None
        activations.checkpoint_layers(model, "full" if recomputed else "none", captured=graph)
        module = modules.CausalLMModule(model, ADAMW, chunked_loss=loss).cuda()
        if compiled:
            regional.CompiledLayers(model, shapes=2)
        graphed = module.graph_passes()
        torch.manual_seed(0)
        losses[graph] = []
        for length in (24, 24, 24, 40, 24, 40):
            batch = {key: torch.randint(3, 90, (2, length), device="cuda") for key in ("input_ids", "labels")}
            with torch.autocast("cuda", torch.bfloat16):
                losses[graph].append(float(graphed(batch) if graph else module._both_passes(batch)))
        gradients[graph] = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        if graph:
            assert graphed.not_captured is None
            assert graphed.counts() == {"graphed_shapes": 2}
            graphed.close()
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    for name, value in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are a GPU's")
def test_a_card_s_graph_follows_the_scaler_s_factor():
    module = modules.CausalLMModule(adapted().cuda().train(), ADAMW).cuda()
    module._scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    graphed = module.graph_passes()
    batch = {key: torch.randint(3, 90, (2, 24), device="cuda") for key in ("input_ids", "labels")}
    norms = []
    for scale in (256.0, 256.0, 256.0, 64.0):
        module._scaler.update(scale) if norms else None
        with torch.autocast("cuda", torch.float16):
            graphed(batch)
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in graphed._trained])))
        graphed.clear_gradients()
    assert graphed.not_captured is None
    assert norms == pytest.approx([norms[0], norms[0], norms[0], norms[0] / 4], rel=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are a GPU's")
def test_a_card_s_graph_draws_new_masks_each_time():
    module = modules.CausalLMModule(adapted(lora_dropout=0.5).cuda().train(), ADAMW).cuda()
    graphed = module.graph_passes()
    batch = {key: torch.randint(3, 90, (2, 24), device="cuda") for key in ("input_ids", "labels")}
    losses = [float(graphed(batch)) for _ in range(4)]
    assert graphed.not_captured is None
    assert len(set(losses)) == 4


def adapted(method=LoraConfig, model=None, **options):
    """A small model that needs no file."""
    torch.manual_seed(1)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=100, **shape, **(model or {})))
    start = {"init_weights" if method is LoKrConfig else "init_lora_weights": False}
    return get_peft_model(base, method(r=4, target_modules=["q_proj", "down_proj"], **start, **options))


def test_a_loss_that_no_parameter_reaches_is_not_passed_over():
    module = modules.CausalLMModule(adapted(), ADAMW)
    module._loss = lambda batch: torch.zeros(())
    batch = {key: torch.arange(3, 9)[None] for key in ("input_ids", "labels")}
    with pytest.raises(RuntimeError, match="does not require grad"):
        module.training_step(batch, 0).backward()
