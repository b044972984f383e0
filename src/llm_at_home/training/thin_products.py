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
    changed = _changed(module)
    region = 0  # products under another autocast are others
    for node in module.graph.nodes:
        if getattr(node.target, "__name__", "").endswith(("_autocast", "_grad_enabled")):
            region += 1
        weight = _trained_weight(module, node)
        if weight is None:
            continue
        outputs = weight.shape[PRODUCTS[node.target]]
        made_of = list(_ancestors(node.args[1]))
        if outputs > MOST or outputs * TIMES > weight.numel() // outputs or not changed.isdisjoint(made_of):
            continue
        *repeated, root = _repeated(node.args[0])
        if changed.isdisjoint([*repeated, root]):
            how = tuple((again.target, again.args[1:], tuple(again.kwargs.items())) for again in repeated)
            groups[(region, node.target, weight.dtype, root, how)].append(node)
    several = [nodes for nodes in groups.values() if len(nodes) > 1]
    for nodes in several:
        _join(module, nodes)
    return sum(len(nodes) for nodes in several)


def _join(module: GraphModule, nodes: list[Node]) -> None:
    first, graph = nodes[0], module.graph
    across = PRODUCTS[first.target]
    sizes = [_value(module, node.args[1]).shape[across] for node in nodes]
    with graph.inserting_before(first):
        # What weights are computed from comes first in the graph; of some the computing may come after.
        copies: dict[Node, Node] = {}
        for node in nodes:
            for one in reversed(list(_ancestors(node.args[1]))):
                if one.op.startswith("call_") and one not in copies:
                    copies[one] = graph.node_copy(one, lambda other: copies.get(other, other))
        weights: list[Any] = [copies.get(one, one) for one in (node.args[1] for node in nodes)]  # type: ignore[arg-type]
        function: Any = first.target
        product = graph.call_function(function, (first.args[0], graph.call_function(torch.cat, (weights, across))))
        parts = graph.call_function(torch.split, (product, sizes), {"dim": -1})
        for place, node in enumerate(nodes):
            node.replace_all_uses_with(graph.call_function(operator.getitem, (parts, place)))
    _erase(module, [*nodes, *copies])


def _scale_weights(module: GraphModule) -> int:
    scaled = 0
    changed = _changed(module)
    for node in list(module.graph.nodes):
        weight = _trained_weight(module, node)
        if weight is None or node in changed:
            continue
        inputs = weight.shape[1 - PRODUCTS[node.target]]
        if inputs > MOST or inputs * TIMES > weight.numel() // inputs:
            continue
        product, scales = node, list[Any]()
        while (user := _scale_of(module, product)) is not None:
            scales.append(user)
            product = user
        if not scales:
            continue
        with module.graph.inserting_before(product):
            weights = node.args[1]
            for scale in scales:
                weights = module.graph.call_function(scale.target, (weights, scale.args[1]))
            made: Any = node.target
            product.replace_all_uses_with(module.graph.call_function(made, (node.args[0], weights)))
        _erase(module, [node, *scales])
        scaled += 1
    return scaled


def _scale_of(module: GraphModule, product: Node) -> Node | None:
    """What alone uses a product, if it multiplies or divides it by one number and leaves the sum it goes into as is."""
    if len(product.users) != 1:
        return None
    (user,) = product.users
    if user.op != "call_function" or user.target not in SCALES or user.args[0] is not product:
        return None
    factor = user.args[1]
    if isinstance(factor, torch.fx.Node):
        value = _value(module, factor)
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or value.requires_grad:
            return None
    elif not isinstance(factor, (int, float)):
        return None
    kept = _value(module, user).dtype == _value(module, product).dtype
    added = all(one.target is operator.iadd and one.args[1] is user for one in user.users)
    scaled_on = len(user.users) == 1 and _scale_of(module, user) is not None
    return user if kept or added or scaled_on else None


def _erase(module: GraphModule, nodes: Iterable[Node]) -> None:
    """What nothing uses any more; torch's own clearing would take changes in place with it."""
    places = {node: place for place, node in enumerate(module.graph.nodes)}
    for node in sorted(nodes, key=places.__getitem__, reverse=True):
        if not node.users:
            module.graph.erase_node(node)


def _trained_weight(module: GraphModule, node: Node) -> Any:
    """The matrix that a product without a bias multiplies with, if it is trained, or made of what is."""
    if node.op != "call_function" or node.target not in PRODUCTS or node.kwargs:
        return None
    if len(node.args) == 3 and node.args[2] is not None:
        return None
    weight = _value(module, node.args[1])
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not weight.requires_grad:
        return None
    leaves = [_value(module, one) for one in _ancestors(node.args[1]) if not one.op.startswith("call_")]
    # Activations have more dimensions than weights have.
    return weight if all(isinstance(leaf, torch.Tensor) and leaf.dim() <= 2 for leaf in leaves) else None


def _value(module: GraphModule, node: Any) -> Any:
    """What the tracing saw there."""
    return module.get_parameter(node.target) if node.op == "get_attr" else node.meta.get("example_value")


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


def _changed(module: GraphModule) -> set[Any]:
    """What is changed in place."""
    return {node.args[0] for node in module.graph.nodes if _is_in_place(node)}


def _is_in_place(node: Node) -> bool:
    if not node.op.startswith("call_") or not node.args:
        return False
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    return name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))
