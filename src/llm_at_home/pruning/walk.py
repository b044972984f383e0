"""Prunes a decoder one layer after another, each on what the pruned layers before it put out."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from llm_at_home.errors import Refusal
from llm_at_home.pruning.pattern import Pattern


@dataclass
class Call:
    """What a decoder layer is called with for one text: hidden states of shape (1, tokens, width), and the rest."""

    hidden: torch.Tensor
    rest: dict[str, Any]


class _Reached(Exception):
    """The first layer has what it is called with, and the others need not run."""


def prune_layers(model: Any, rows: Sequence[Sequence[int]], options: Mapping[str, Any], device: str) -> None:
    """Prune the linear layers of every decoder layer in place; embeddings, norms and the output head stay.

    The model stays where it is; one decoder layer at a time, and one text's activations, are on the device.

    Args:
        model: a dense causal language model of transformers.
        rows: token ids of the calibration texts; unused where the method looks at no inputs.
        options: the ``prune`` group.
        device: that computes.

    Raises:
        Refusal: for an architecture whose layers are not called alike, or whose widths the pattern does not divide.
        RuntimeError: for weights or activations that are not finite.
    """
    layers = model.get_decoder().layers
    pattern = Pattern.of(options)
    method = importlib.import_module(f"llm_at_home.pruning.{options['method']}")
    start = time.perf_counter()
    with torch.no_grad():
        calls = _first_calls(model, layers, rows) if method.Statistics else []
        for i, layer in enumerate(layers):
            home = next(layer.parameters()).device
            layer.to(device)
            linear = {f"{i}.{name}": m for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
            statistics = _statistics(layer, linear, calls, method.Statistics, device)
            for name, module in linear.items():
                _prune(name, module, statistics.get(name), method.prune, pattern, options)
            for call in calls:
                call.hidden = _run(layer, call, device)
                if not call.hidden.isfinite().all():
                    raise RuntimeError(f"the outputs of decoder layer {i} are not finite: there is nothing to prune by")
            layer.to(home)
            _say(i + 1, len(layers), start)


def _prune(
    name: str,
    module: torch.nn.Linear,
    statistics: Any,
    prune: Callable[..., torch.Tensor],
    pattern: Pattern,
    options: Mapping[str, Any],
) -> None:
    if pattern.group and module.in_features % pattern.group:
        raise Refusal(
            f"prune.pattern={options['pattern']} does not divide the {module.in_features} inputs of layer {name}: use "
            "prune.pattern=unstructured"
        )
    if not module.weight.isfinite().all():
        raise RuntimeError(f"the weights of layer {name} are not finite: the model is damaged")
    module.weight.copy_(prune(module.weight.float(), statistics, pattern, options))


def _statistics(
    layer: Any, linear: Mapping[str, torch.nn.Linear], calls: Sequence[Call], kind: Any, device: str
) -> dict[str, Any]:
    """The statistics of the inputs of each linear layer; layers that are given the same tensor share theirs."""
    found: dict[str, Any] = {}
    latest: tuple[Any, str] = (None, "")  # the tensor itself is held, so that another cannot take its place in memory

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Linear, args: tuple[torch.Tensor, ...]) -> None:
            nonlocal latest
            if args[0] is latest[0]:
                found[name] = found[latest[1]]
                return
            if name not in found:
                found[name] = kind(module.in_features, device)
            found[name].add(args[0].reshape(-1, module.in_features))
            latest = (args[0], name)

        return hook

    with _hooks(module.register_forward_pre_hook(watch(name)) for name, module in linear.items()):
        for call in calls:
            latest = (None, "")
            _run(layer, call, device)
    if calls and len(found) < len(linear):
        unseen = next(name for name in linear if name not in found)
        raise Refusal(f"layer {unseen} saw no calibration token: use prune=magnitude")
    return found


def _run(layer: Any, call: Call, device: str) -> torch.Tensor:
    out = layer(_to(call.hidden, device), **_to(call.rest, device))
    return _first(out).to(call.hidden.device)


def _first_calls(model: Any, layers: Any, rows: Sequence[Sequence[int]]) -> list[Call]:
    _check_alike(model, layers, max(rows, key=len))
    calls: list[Call] = []

    def catch(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(_call(args, kwargs))
        raise _Reached

    with _hooks([layers[0].register_forward_pre_hook(catch, with_kwargs=True)]):
        for row in rows:
            try:
                _forward(model, row)
            except _Reached:
                continue
    return calls


def _check_alike(model: Any, layers: Any, row: Sequence[int]) -> None:
    """See that what is true of the first layer's call is true of all: each takes the last one's output, and the rest.

    Raises:
        Refusal: for layers with masks or positions of their own, such as alternating sliding windows.
    """
    seen: list[Call] = []
    outputs: list[torch.Tensor] = []

    def before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = _call(args, kwargs)
        if seen and not (_same(call.rest, seen[0].rest) and torch.equal(call.hidden, outputs[-1])):
            raise Refusal(
                f"the decoder layers of {model.config.model_type} are not called alike, so they cannot be pruned one "
                "by one: use prune=magnitude"
            )
        seen[:] = [call]

    def after(layer: Any, args: tuple[Any, ...], out: Any) -> None:
        outputs[:] = [_first(out)]

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    with _hooks([*handles, *(layer.register_forward_hook(after) for layer in layers)]):
        _forward(model, row)


def _forward(model: Any, row: Sequence[int]) -> None:
    device = next(model.parameters()).device
    model.get_decoder()(input_ids=torch.tensor([row], device=device), use_cache=False)


def _call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    rest = dict(kwargs)
    return Call(args[0] if args else rest.pop("hidden_states"), rest)


def _first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)


def _to(value: Any, device: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(inner, device) for key, inner in value.items()}
    return tuple(_to(inner, device) for inner in value) if isinstance(value, tuple) else value


@contextmanager
def _hooks(handles: Any) -> Iterator[None]:
    made = list(handles)
    try:
        yield
    finally:
        for handle in made:
            handle.remove()


def _say(done: int, layers: int, start: float) -> None:
    if done == layers or done * 10 // layers > (done - 1) * 10 // layers:
        print(f"pruned layer {done} of {layers}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
