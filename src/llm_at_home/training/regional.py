"""Regional compilation: the decoder layers alone are compiled, in place, and all of them share their graphs.

What is compiled once serves every layer: they differ in their weights, which are inputs. Module names stay as they
are, so that checkpoints do too.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.paths import cache_dir
from llm_at_home.records.schema import Reading

LAYERS, OFF = "layers", "off"
BACKEND = "inductor"
# By shape: the first layer, whose input takes no gradient, the others, and both again where packing needs no mask.
GRAPHS_PER_SHAPE = 4
METHOD = "dynamo_clock"
CACHE = "TORCHINDUCTOR_CACHE_DIR"


class CompiledLayers:
    """The decoder layers of a model, compiled in place when they are first run.

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter.
        shapes: of a batch; a further one makes torch run a layer without compiling it.
        processes: of the run.

    Raises:
        Refusal: when the architecture has no decoder layers of transformers' kind.
    """

    def __init__(self, model: Any, shapes: int, processes: int = 1) -> None:
        import torch
        from torch._dynamo.utils import counters
        from transformers.modeling_layers import GradientCheckpointingLayer

        from llm_at_home.training import thin_products

        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise Refusal(f"{type(model).__name__} has no decoder layers to compile: use trainer.compile=off")
        keep_compiled()
        limit = shapes * GRAPHS_PER_SHAPE
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
        if processes > 1:
            # It would cut a layer's graph where gradients are sent; between layers they are sent anyway.
            torch._dynamo.config.optimize_ddp = False
        backend = thin_products.backend(BACKEND)
        for layer in layers:
            layer.compile(backend=backend, dynamic=False)
        self._layers = layers
        self._counters = counters
        self._before = {name: Counter(counters[name]) for name in ("stats", "graph_break")}
        self._seconds = _compile_seconds()

    def function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function outside the layers, compiled as they are."""
        import torch

        return torch.compile(function, backend=BACKEND, dynamic=False)

    def counts(self) -> dict[str, int]:
        """``compiled_layers``, ``compiled_graphs`` (shared by layers) with the loss's, and ``graph_breaks`` within."""
        graphs = self._counters["stats"]["unique_graphs"] - self._before["stats"]["unique_graphs"]
        return {
            "compiled_layers": len(self._layers),
            "compiled_graphs": graphs,
            "graph_breaks": sum(self._breaks().values()),
        }

    def end(self) -> None:
        """Run the layers as they were: what comes after training has other shapes, each of which would be compiled."""
        for layer in self._layers:
            layer._compiled_call_impl = None

    def notes(self) -> list[str]:
        """What broke a layer's graph, a line each; usually nothing."""
        return [f"a compiled layer was cut: {str(why).splitlines()[0]}" for why in self._breaks()]

    def readings(self) -> dict[str, Reading]:
        """``compile_time``: of all graphs, forth and back, also where they came from the cache."""
        return {"compile_time": Reading(_compile_seconds() - self._seconds, "s", METHOD)}

    def _breaks(self) -> Counter[Any]:
        return Counter(self._counters["graph_break"]) - self._before["graph_break"]


def keep_compiled() -> None:
    """Keep compiled code in this project's cache for the next run, unless the user named a folder."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch names its own default there as soon as it is asked for it.
    if os.environ.get(CACHE) in (None, os.path.abspath(default_cache_dir())):
        os.environ[CACHE] = str(cache_dir() / "inductor")


def _compile_seconds() -> float:
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent()["total_wall_time"]
