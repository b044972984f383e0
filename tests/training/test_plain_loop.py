"""A whole run gives the losses of a plain loop of transformers, PEFT and torch."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_at_home.models.embedded import ensure_converted
from llm_at_home.tasks import train

STEPS, ACCUMULATED, RATE = 6, 2, 1e-3
WORDS = [
    *("adapter=lora", "adapter.r=8", "data.max_length=48", "data.batch_size=2", "limit=40"),
    *(f"callbacks.accumulation.steps={ACCUMULATED}", f"optimizer.lr={RATE}", "scheduler=linear"),
    f"trainer.max_steps={STEPS}",
]


def plain_loop(model, batches):
    """As it would be written without this project: losses, gradient norms and learning rates by step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
    steps = []
    for step in range(STEPS):
        window = batches[step * ACCUMULATED : (step + 1) * ACCUMULATED]
        tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
        optimizer.zero_grad()
        loss = 0.0
        for batch in window:
            part = model(**batch, num_items_in_batch=tokens).loss
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.3).item()
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        steps.append({"loss": loss, "gradient_norm": norm, "lr": rate})
    return steps


@pytest.mark.parametrize("name", ["tiny", pytest.param("smollm2_135m", marks=pytest.mark.slow)])
def test_a_run_follows_a_plain_loop(tmp_path, tiny_model, resolved, train_here, name):
    source = tiny_model if name == "tiny" else ensure_converted()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    model = peft.get_peft_model(base, lora).train()
    model.save_pretrained(tmp_path / "start")
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    words = [*WORDS, f"adapter_path={tmp_path}/start"]
    words += ["model=custom", f"model.source={source}"] if name == "tiny" else []
    data, _ = train._data(resolved(words))
    wanted = plain_loop(model, list(data.train_dataloader()))
    record = train_here(words, tmp_path / "run")
    lines = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    found = [dict(zip(lines[0], map(float, line), strict=True)) for line in lines[1:]]
    assert len(found) == STEPS
    for key in ("loss", "gradient_norm", "lr"):
        # Rounding grows through the steps.
        assert [step[key] for step in found] == pytest.approx([step[key] for step in wanted], rel=1e-4), key
    assert record.quality["loss_last"].value < record.quality["loss_first"].value
    assert any(step["gradient_norm"] > 0.3 for step in found), "clipping was to act"

    fresh = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    saved = dict(peft.PeftModel.from_pretrained(fresh, tmp_path / "run" / "adapter").named_parameters())
    wanted = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    moved = sum(float((wanted[name] - start[name]).square().sum()) for name in start) ** 0.5
    apart = sum(float((wanted[name] - saved[name].detach()).square().sum()) for name in start) ** 0.5
    # AdamW moves a weight whose gradient is rounding alone by a whole step, so that single weights may differ.
    assert apart < 0.01 * moved
