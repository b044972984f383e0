"""The thin products of adapters, arranged before a layer is compiled: fewer of them, and nothing wide is only scaled.

Two changes of a traced graph, neither of which changes what is computed but for rounding:

- Products of one input with few outputs each, such as LoRA's down-projections of queries, keys and values, become one.
  Each by itself reads all of its input. Stacked, the input is read once forth, and once back for the weights'
  gradients; and one product gives the input's gradient where several were written and added.
- A product with few inputs that is then scaled, such as LoRA's up-projection by alpha / r, has its weights scaled
  instead. Else the backward pass writes the scaled gradient of a whole activation, for two thin products to read.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

# A thin product has at most so many outputs (or inputs), and at least so many times as many inputs (or outputs).
MOST, TIMES = 256, 8
# By function: the dimension of its weights that is the outputs.
PRODUCTS: dict[Any, int] = {torch.nn.functional.linear: 0, operator.matmul: 1, torch.matmul: 1}
SCALES = (operator.mul, operator.truediv)
# Methods that give the same tensor when they are called again.
REPEATED = ("to", "unflatten", "flatten", "view", "reshape")
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "setitem")


def backend(name: str) -> Callable[..., Any]:
    """The backend of torch.compile of that name, which gets graphs with their thin products arranged."""
    compile_graph = torch._dynamo.lookup_backend(name)

    def compile_arranged(module: GraphModule, inputs: Any, **options: Any) -> Any:
        arrange(module)
        return compile_graph(module, inputs, **options)

    return compile_arranged


def arrange(module: GraphModule) -> dict[str, int]:
    """Arrange the thin products of a graph, in place, and of those nested in it.

    Args:
        module: as dynamo traced it, before it is differentiated.

    Returns:
        How many products were ``stacked``, and how many ``scaled`` by their weights.
    """
    counts = {"stacked": 0, "scaled": 0}
    for part in module.modules():
        if isinstance(part, torch.fx.GraphModule):
            counts["scaled"] += _scale_weights(part)
            counts["stacked"] += _stack(part)
            part.graph.lint()
            part.recompile()
    return counts


def _stack(module: GraphModule) -> int:
    groups: defaultdict[Hashable, list[Node]] = defaultdict(list)
    changed, regions = _changed(module), _regions(module)
    grouped: set[Node] = set()
    for node in module.graph.nodes:
        weight = _trained_weight(node)
        if weight is None:
            continue
        outputs = weight.shape[PRODUCTS[node.target]]
        made_of = list(_ancestors(node.args[1]))
        if outputs > MOST or outputs * TIMES > weight.numel() // outputs:
            continue
        if not changed.isdisjoint(made_of) or not grouped.isdisjoint(made_of):
            continue
        *repeated, root = _repeated(node.args[0])
        if changed.isdisjoint([*repeated, root]):
            how = tuple((again.target, again.args[1:], tuple(again.kwargs.items())) for again in repeated)
            groups[(regions[node], node.target, weight.dtype, root, how)].append(node)
            grouped.add(node)
    several = [nodes for nodes in groups.values() if len(nodes) > 1]
    for nodes in several:
        _join(module, nodes)
    return sum(len(nodes) for nodes in several)


def _join(module: GraphModule, nodes: list[Node]) -> None:
    first, graph = nodes[0], module.graph
    across = PRODUCTS[first.target]
    sizes = [_value(node.args[1]).shape[across] for node in nodes]
    # What weights are computed from comes before the first product; of some the computing may come after it.
    for node in nodes:
        for one in sorted(_ancestors(node.args[1])):
            if one > first:
                first.prepend(one)
    with graph.inserting_before(first):
        weights = [node.args[1] for node in nodes]
        function: Any = first.target
        product = graph.call_function(function, (first.args[0], graph.call_function(torch.cat, (weights, across))))
        # Unlike those of torch.split, these may be changed in place.
        parts = graph.call_function(torch.unsafe_split_with_sizes, (product, sizes), {"dim": -1})
        for place, node in enumerate(nodes):
            node.replace_all_uses_with(graph.call_function(operator.getitem, (parts, place)))
    _erase(module, nodes)


def _scale_weights(module: GraphModule) -> int:
    scaled = 0
    changed, regions = _changed(module), _regions(module)
    for node in list(module.graph.nodes):
        weight = _trained_weight(node)
        if weight is None or node in changed:
            continue
        inputs = weight.shape[1 - PRODUCTS[node.target]]
        if inputs > MOST or inputs * TIMES > weight.numel() // inputs:
            continue
        scales = list[Any]()
        while (user := _scale_of([node, *scales][-1], weight)) is not None and regions[user] == regions[node]:
            scales.append(user)
        while scales and not _is_as_wide(scales[-1], node):
            scales.pop()
        if not scales:
            continue
        product = scales[-1]
        with module.graph.inserting_before(product):
            weights = node.args[1]
            for scale in scales:
                weights = module.graph.call_function(scale.target, (weights, scale.args[1]))
            made: Any = node.target
            product.replace_all_uses_with(module.graph.call_function(made, (node.args[0], weights)))
        _erase(module, [node, *scales])
        scaled += 1
    return scaled


def _scale_of(product: Node, weight: torch.Tensor) -> Node | None:
    """What alone uses a product, if it multiplies or divides it by one number, which does not widen its weights."""
    if len(product.users) != 1:
        return None
    (user,) = product.users
    if user.op != "call_function" or user.target not in SCALES or user.args[0] is not product:
        return None
    factor = user.args[1]
    if not isinstance(factor, torch.fx.Node):
        return user if isinstance(factor, (int, float)) else None
    value = _value(factor)
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or value.dim() > 1 or value.requires_grad:
        return None
    return user if torch.result_type(weight, value) == weight.dtype else None


def _is_as_wide(scaled: Node, product: Node) -> bool:
    """Whether a scale leaves the product's dtype, or at least that of the sum it goes into, as it is."""
    kept = _value(scaled).dtype == _value(product).dtype
    return kept or all(one.target is operator.iadd and one.args[1] is scaled for one in scaled.users)


def _erase(module: GraphModule, nodes: Iterable[Node]) -> None:
    """What nothing uses any more; torch's own clearing would take changes in place with it."""
    places = {node: place for place, node in enumerate(module.graph.nodes)}
    for node in sorted(nodes, key=places.__getitem__, reverse=True):
        if not node.users:
            module.graph.erase_node(node)


def _trained_weight(node: Node) -> Any:
    """The matrix that a product without a bias multiplies with, if it is trained, or made of what is."""
    if node.op != "call_function" or node.target not in PRODUCTS or node.kwargs:
        return None
    if len(node.args) == 3 and node.args[2] is not None:
        return None
    weight = _value(node.args[1])
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not weight.requires_grad:
        return None
    leaves = [_value(one) for one in _ancestors(node.args[1]) if not one.op.startswith("call_")]
    # Activations have more dimensions than weights have.
    return weight if all(isinstance(leaf, torch.Tensor) and leaf.dim() <= 2 for leaf in leaves) else None


def _value(node: Any) -> Any:
    """What the tracing saw there."""
    return node.meta.get("example_value")


def _ancestors(node: Any) -> Iterator[Any]:
    """The node and all that it is computed from, each after what is computed from it."""
    waiting, seen = [node], set()
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            yield one
            waiting += one.all_input_nodes


def _repeated(node: Any) -> Iterator[Any]:
    """What gives the same again, such as a cast of one tensor to one dtype; the tensor itself is last."""
    while node.op == "call_method" and node.target in REPEATED:
        yield node
        node = node.args[0]
    yield node


def _regions(module: GraphModule) -> dict[Any, int]:
    """A number for each node, another one under another autocast, where products are others."""
    numbers, region = {}, 0
    for node in module.graph.nodes:
        region += getattr(node.target, "__name__", "").endswith(("_autocast", "_grad_enabled"))
        numbers[node] = region
    return numbers


def _changed(module: GraphModule) -> set[Any]:
    """What is changed in place."""
    return {node.args[0] for node in module.graph.nodes if _is_in_place(node)}


def _is_in_place(node: Node) -> bool:
    if not node.op.startswith("call_") or not node.args:
        return False
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    return name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))
