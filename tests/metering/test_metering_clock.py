"""The speed figures against work whose time is known, whatever the machine adds: it ends on an absolute schedule."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from llm_at_home.generation.eager import EagerEngine
from llm_at_home.generation.reply import Sampling
from llm_at_home.tasks.infer import _speed
from llm_at_home.training.callbacks.throughput import Throughput

STEP = 0.02
TOKENS = 61  # 60 intervals: 1.2 s


def wait_until(deadline: float) -> None:
    """Sleep, and spin over the last two milliseconds, in which a sleep could be late."""
    time.sleep(max(0.0, deadline - 0.002 - time.perf_counter()))
    while time.perf_counter() < deadline:
        pass


class Schedule:
    """Deadlines ``STEP`` apart, from the first call on."""

    def __init__(self) -> None:
        self.next: float | None = None

    def wait(self) -> None:
        self.next = time.perf_counter() + STEP if self.next is None else self.next + STEP
        wait_until(self.next)


@pytest.fixture
def metronome():
    """A real causal model of transformers, each of whose forward passes ends at its deadline."""
    from transformers import LlamaConfig, LlamaForCausalLM

    class Metronome(LlamaForCausalLM):
        schedule = Schedule()

        def forward(self, *arguments, **options):
            output = super().forward(*arguments, **options)
            self.schedule.wait()
            return output

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Metronome(config).eval()


def test_the_decode_rate_of_a_known_step_is_right_within_one_percent(metronome) -> None:
    engine = EagerEngine(metronome, None, max_new_tokens=TOKENS)
    engine.reply([1, 2, 3], Sampling(2, ignore_eos=True))  # what is made at the first call is not timed
    metronome.schedule.next = None
    reply = engine.reply([1, 2, 3], Sampling(TOKENS, ignore_eos=True))
    assert sum(reply.intervals) > 1.0
    figures = _speed([[reply]])
    assert figures["decode_tokens_per_second"].value == pytest.approx(1 / STEP, rel=0.01)
    assert figures["inter_token_latency_median"].value == pytest.approx(STEP, rel=0.05)
    assert figures["time_to_first_token"].value >= STEP


def test_the_rate_of_training_steps_is_right_within_one_percent() -> None:
    """Each step ends a known time after its first micro-batch began; between steps anything may happen."""
    throughput = Throughput(warmup_steps=1)
    trainer, module = SimpleNamespace(global_step=0), SimpleNamespace(device=torch.device("cpu"))
    batch = {"attention_mask": torch.ones(2, 5)}
    throughput.on_train_start(trainer, module)
    for step in range(27):
        begin = time.perf_counter()
        for micro in range(2):
            throughput.on_train_batch_start(trainer, module, batch, micro)
            wait_until(begin + 0.02 * (micro + 1) + (0.5 if step == 0 else 0.0))
            trainer.global_step += micro
            throughput.on_train_batch_end(trainer, module, None, batch, micro)
        time.sleep(0.005)
    figures = throughput.readings()
    assert figures["steps_per_second"].n == 26  # 1.04 s
    assert figures["steps_per_second"].value == pytest.approx(1 / 0.04, rel=0.01)
    assert figures["tokens_per_second"].value == pytest.approx(20 / 0.04, rel=0.01)
    assert figures["warmup_time"].value == pytest.approx(0.54, rel=0.05)
