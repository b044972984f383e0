"""A captured function repeats its work; one that cannot be captured leaves the card as it was."""

from __future__ import annotations

import pytest
import torch

from llm_at_home.hardware.capture import captured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are a GPU's")


@pytest.fixture
def where():
    return torch.cuda.Stream(), torch.cuda.graph_pool_handle()


def on(stream, function):
    with torch.cuda.stream(stream):
        function()
    stream.synchronize()


def test_a_replay_reads_its_inputs_anew(where):
    a = torch.ones(64, 64, device="cuda")
    on(where[0], lambda: a @ a)
    graph, found = captured(lambda: a @ a, *where)
    a.fill_(2.0)
    graph.replay()
    torch.cuda.synchronize()
    assert float(found[0, 0]) == 2 * 2 * 64


def test_a_capture_that_fails_leaves_stream_and_memory_as_they_were(where):
    a = torch.ones(2048, 2048, device="cuda")
    on(where[0], lambda: a @ a)
    float((a @ a)[0, 0])  # each stream's products keep a workspace of 32 MiB from the first on
    before = torch.cuda.get_rng_state()
    draws = torch.rand(8, device="cuda")
    torch.cuda.set_rng_state(before)
    torch.cuda.empty_cache()
    held, stream = torch.cuda.memory_reserved(), torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        captured(lambda: float((a @ a).sum()), *where)  # asks the device for a number
    assert torch.cuda.current_stream() == stream
    assert float((a @ a)[0, 0]) == 2048
    assert torch.equal(torch.rand(8, device="cuda"), draws)  # as if nothing had been tried
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= held + 2**24
    graph, _ = captured(lambda: a @ a, where[0], torch.cuda.graph_pool_handle())
    graph.replay()
    torch.cuda.synchronize()
