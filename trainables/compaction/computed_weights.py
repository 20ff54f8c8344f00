"""Weights that a network's own code computes from its parameters alone, such as standardised ones:
computed once, so that its layers are plain ones whose units can go."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from slimfront.trainables.structure.graph import submodule

_LAYERS: dict[object, int] = {F.linear: 1, F.conv1d: 1, F.conv2d: 1, F.conv3d: 1}
"""Where the weight stands among the arguments of functions that layers are made of."""


@torch.no_grad()
def compute_weights(network: fx.GraphModule) -> bool:
    """Has functions of layers read weights that are held, where the network's code computes them
    from parameters that nothing else reads, in place; whether there was any.

    As with parametrisations, the network computes the same, and is trained further by the weights
    themselves.
    """
    found = False
    for node in list(network.graph.nodes):
        if node.op != "call_function" or node.target not in _LAYERS:
            continue
        weight = _argument(node, _LAYERS[node.target], "weight")
        steps = _steps(weight, node)
        if steps is not None and _held_alone(network, steps):
            found |= _replace(network, weight, steps)
    return found


def _argument(node: fx.Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def _steps(weight: Any, reader: fx.Node) -> list[fx.Node] | None:
    """The nodes that make a weight, in the order of the graph, if they read nothing but parameters
    and only `reader` reads what they make; None if not, or if it is a parameter."""
    if not isinstance(weight, fx.Node) or weight.op == "get_attr":
        return None
    found, waiting = {weight}, [weight]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    reads_inputs = any(node.op in ("placeholder", "call_module") for node in found)
    users = {user for node in found for user in node.users}
    if reads_inputs or not users <= found | {reader}:
        return None
    return [node for node in reader.graph.nodes if node in found]


def _held_alone(network: fx.GraphModule, steps: list[fx.Node]) -> bool:
    """Whether nothing else reads what the weight is made of, and some of it is a parameter."""
    names = {str(node.target) for node in steps if node.op == "get_attr"}
    tensors = [_read(network, name) for name in names]
    if not any(isinstance(tensor, nn.Parameter) for tensor in tensors):
        return False
    called = {str(node.target) for node in network.graph.nodes if node.op == "call_module"}
    others = {
        str(node.target)
        for node in network.graph.nodes
        if node.op == "get_attr" and node not in steps
    }
    elsewhere = [
        id(tensor)
        for name, tensor in network.named_parameters(remove_duplicate=False)
        if name in others or name.rpartition(".")[0] in called
    ]
    return not {id(tensor) for tensor in tensors if isinstance(tensor, nn.Parameter)} & {*elsewhere}


def _replace(network: fx.GraphModule, weight: fx.Node, steps: list[fx.Node]) -> bool:
    """Holds the weight in the place of the first parameter that it is made of; whether it is the
    same each time that it is computed."""
    value, again = (_computed(network, weight, steps) for _ in range(2))
    if not isinstance(value, Tensor) or not torch.equal(value, again):
        return False
    names = [str(node.target) for node in steps if node.op == "get_attr"]
    parameters = [name for name in names if isinstance(_read(network, name), nn.Parameter)]
    same = [name for name in parameters if _read(network, name).shape == value.shape]
    kept = (same or parameters)[0]
    with network.graph.inserting_before(weight):
        held = network.graph.get_attr(kept)
    held.meta = dict(weight.meta)
    weight.replace_all_uses_with(held)
    for node in reversed(steps):
        network.graph.erase_node(node)
    owner, _, leaf = kept.rpartition(".")
    for name in set(parameters) - {kept}:
        holder, _, part = name.rpartition(".")
        delattr(network.get_submodule(holder), part)
    setattr(network.get_submodule(owner), leaf, nn.Parameter(value.clone()))
    return True


def _computed(network: fx.GraphModule, weight: fx.Node, steps: list[fx.Node]) -> Any:
    values: dict[fx.Node, Any] = {}
    for node in steps:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: values[source])
        if node.op == "get_attr":
            values[node] = _read(network, str(node.target))
        elif node.op == "call_method":
            values[node] = operator.methodcaller(str(node.target), *args[1:], **kwargs)(args[0])
        else:
            assert callable(node.target)
            values[node] = node.target(*args, **kwargs)
    return values[weight]


def _read(network: fx.GraphModule, name: str) -> Any:
    owner, _, leaf = name.rpartition(".")
    return getattr(submodule(network, owner) if owner else network, leaf)
