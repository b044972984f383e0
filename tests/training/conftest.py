"""A training run on the tiny model, in this process: as train.py makes it, with the callbacks that a test needs."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning import Trainer
from lightning.pytorch.plugins import MixedPrecision
from transformers import AutoConfig, AutoModelForCausalLM

from llm_at_home.models.chat import IGNORED, Encoded
from llm_at_home.records.schema import Record
from llm_at_home.tasks import resolve, train
from llm_at_home.training.activations import ChunkedLoss
from llm_at_home.training.callbacks.accumulation import GradientAccumulation
from llm_at_home.training.callbacks.step_log import StepLog
from llm_at_home.training.data import ChatDataModule
from llm_at_home.training.module import CausalLMModule

CONF = Path(__file__).resolve().parents[2] / "conf"


VOCABULARY = 1000


def random_rows(lengths, trained_share=0.5):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in lengths:
        ids = torch.randint(10, VOCABULARY, (length,), generator=generator).tolist()
        cut = int(length * (1 - trained_share))
        rows.append(Encoded(ids, [IGNORED] * cut + ids[cut:], truncated=False))
    return rows


@pytest.fixture
def conversations():
    """``conversations(lengths, trained_share=0.5)``: random ones, the same each time."""
    return random_rows


@pytest.fixture(scope="session")
def short_vocabulary(tiny_model, tmp_path_factory):
    """The tiny model for those who need no text: 49,152 logits a token are most of its time, in 16 bits nearly all."""
    config = AutoConfig.from_pretrained(tiny_model, vocab_size=VOCABULARY)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "short_vocabulary"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def fit(short_vocabulary, tmp_path):
    """``fit(batch_size, accumulate, ...)`` trains a fresh copy of a tiny model and gives the module back."""

    def run(
        batch_size,
        accumulate,
        steps=2,
        optimizer=None,
        scheduler=None,
        callbacks=(),
        lengths=(5, 40, 12, 33),
        loss_tokens=None,
        prepare=lambda model: model,
        plugins=None,
        resume=None,
        folder=tmp_path,
        **order,
    ):
        torch.manual_seed(0)
        model = prepare(AutoModelForCausalLM.from_pretrained(short_vocabulary, dtype=torch.float32)).train()
        loss = ChunkedLoss(model, loss_tokens) if loss_tokens else None
        module = CausalLMModule(model, optimizer or functools.partial(torch.optim.SGD, lr=0.5), scheduler, loss)
        data = ChatDataModule(random_rows(lengths), batch_size, pad_id=0, seed=0, **order)
        folder.mkdir(exist_ok=True)
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            callbacks=[GradientAccumulation(accumulate), StepLog(folder, None), *callbacks],
            plugins=plugins,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, data, ckpt_path=resume, weights_only=False)
        return module

    return run


@pytest.fixture
def half_precision():
    """``half_precision(scale)``: Lightning's own fp16, which its trainer gives to GPUs alone, from that scale on."""
    return lambda scale: [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]


@pytest.fixture
def resolved():
    """``resolved(words)``: the configuration of train.py with these overrides, on the CPU and without MLflow."""

    def run(words, **gpu):
        words = ["logger=none", "gpu=cpu", "callbacks.power.idle_seconds=0", *words]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = resolve.resolve("train", compose("train", words), words)
        config["gpu"] |= gpu
        return config

    return run


@pytest.fixture
def train_here(resolved):
    """``train_here(words, folder)``: the task itself in this process, without a second to start one; its record."""

    def run(words, folder):
        config = resolved(words)
        resolve.check("train", config)
        record = Record("train", config=config)
        folder.mkdir(exist_ok=True)
        train.run(config, folder, record, None)
        return record

    return run
