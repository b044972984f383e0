"""The speed figures against work whose time is known, whatever the machine adds: it ends on an absolute schedule."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from llm_at_home.generation.eager import EagerEngine
from llm_at_home.generation.reply import Sampling
from llm_at_home.generation.speed import speed_readings
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
        self.ends: list[float] = []

    def wait(self) -> None:
        self.next = time.perf_counter() + STEP if self.next is None else self.next + STEP
        wait_until(self.next)
        self.ends.append(time.perf_counter())  # the deadline, or what a busy machine made of it


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
    metronome.schedule.next, metronome.schedule.ends = None, []
    reply = engine.reply([1, 2, 3], Sampling(TOKENS, ignore_eos=True))
    ends = metronome.schedule.ends
    assert len(ends) == TOKENS
    known = (TOKENS - 1) / (ends[-1] - ends[0])
    assert sum(reply.intervals) > 1.0
    figures = speed_readings([[[reply]]])
    assert figures["decode_tokens_per_second"].value == pytest.approx(known, rel=0.01)
    assert figures["inter_token_latency_median"].value >= 0.9 * STEP
    assert figures["time_to_first_token"].value >= STEP


def test_the_rate_of_training_steps_is_right_within_one_percent() -> None:
    """Each step takes 40 ms, or what a busy machine makes of it by the test's own clock; between steps none counts."""
    throughput = Throughput(warmup_steps=1)
    trainer, module = SimpleNamespace(global_step=0), SimpleNamespace(device=torch.device("cpu"))
    batch = {"attention_mask": torch.ones(2, 5)}
    known = []
    throughput.on_train_start(trainer, module)
    for step in range(27):
        begin = time.perf_counter()
        for micro in range(2):
            throughput.on_train_batch_start(trainer, module, batch, micro)
            wait_until(begin + 0.02 * (micro + 1) + (0.5 if step == 0 else 0.0))
            end = time.perf_counter()
            trainer.global_step += micro
            throughput.on_train_batch_end(trainer, module, None, batch, micro)
        known.append(end - begin)
        time.sleep(0.005)
    figures = throughput.readings()
    rate = 26 / sum(known[1:])
    assert sum(known[1:]) > 1.0
    assert figures["steps_per_second"].n == 26
    assert figures["steps_per_second"].value == pytest.approx(rate, rel=0.01)
    assert figures["tokens_per_second"].value == pytest.approx(20 * rate, rel=0.01)
    assert figures["warmup_time"].value == pytest.approx(known[0], rel=0.01)
