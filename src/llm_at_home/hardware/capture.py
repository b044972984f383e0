"""What a function does on a GPU as a CUDA graph, which one call repeats."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

_failed: list[Any] = []  # which an allocator still has an address of


def captured(function: Callable[[], Any], stream: Any, pool: Any) -> tuple[Any, Any]:
    """A function's work as a graph.

    When a capture fails, ``torch.cuda.graph`` would leave its stream the current one, and the allocator and the
    generator of random numbers in a capture.

    Args:
        function: must have run on the stream before, so that nothing is compiled or chosen now.
        stream: a ``torch.cuda.Stream``, not the default one.
        pool: a ``torch.cuda.graph_pool_handle``, whose memory the graph's tensors have.

    Returns:
        The ``torch.cuda.CUDAGraph``, and what the function returned, which each replay fills anew.

    Raises:
        RuntimeError: where the work cannot be captured; torch.OutOfMemoryError is one. The pool is given up with it.
    """
    import torch

    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()  # what ran before this kept is free, and the graph's pool cannot use it
    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    draws = generator.clone_state()
    with torch.cuda.stream(stream):
        # Threads of autograd take part; those that only watch the card may go on.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            found = function()
        except BaseException:
            _give_up(graph, pool)
            generator.graphsafe_set_state(draws)  # its own would refuse to draw outside a capture from here on
            raise
        graph.capture_end()
    return graph, found


def _give_up(graph: Any, pool: Any) -> None:
    """End a capture that failed, and tell the allocator, which the failing end does not: the pool's memory is free.

    The allocator of pinned memory cannot be told: it goes on asking the graph which stream is its own, and refuses the
    pool to another capture.
    """
    import torch

    _failed.append(graph)
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
