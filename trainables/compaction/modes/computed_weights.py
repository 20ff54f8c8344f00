"""Weights that a network's own code computes from its parameters alone, such as standardised ones:
computed once, so that its layers are plain ones whose units can go."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from slimfront.trainables.compaction.layers import delete_tensor, set_tensor
from slimfront.trainables.structure.graph import ancestors, tensor_at

_LAYERS: dict[object, int] = {F.linear: 1, F.conv1d: 1, F.conv2d: 1, F.conv3d: 1}
"""Where the weight stands among the arguments of functions that layers are made of."""


@torch.no_grad()
def compute_weights(network: GraphModule) -> bool:
    """Has functions of layers read weights that are held, where the network's code computes them
    from parameters that nothing else reads, in place; whether there was any.

    As with parametrisations, the network computes the same, and is trained further by the weights
    themselves.
    """
    found = False
    for node in list(network.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target not in _LAYERS:
            continue
        weight = _weight_of(node)
        steps = _steps(weight, node)
        if steps is None:
            continue
        if not _held_alone(network, steps):
            continue
        if _replace(network, weight, steps):
            found = True
    return found


def _weight_of(node: Node) -> Any:
    """What the function of a layer is given as its weight."""
    place = _LAYERS[node.target]
    if len(node.args) > place:
        return node.args[place]
    return node.kwargs.get("weight")


def _steps(weight: Any, reader: Node) -> list[Node] | None:
    """The nodes that make a weight, in the order of the graph, if they read nothing but parameters
    and only `reader` reads what they make; None if not, or if it is a parameter."""
    if not isinstance(weight, Node):
        return None
    if weight.op == "get_attr":
        return None
    found = ancestors(weight)
    for node in found:
        if node.op in ("placeholder", "call_module"):
            return None
        for user in node.users:
            if user not in found and user is not reader:
                return None
    return [node for node in reader.graph.nodes if node in found]


def _held_alone(network: GraphModule, steps: list[Node]) -> bool:
    """Whether nothing else reads what the weight is made of, and some of it is a parameter."""
    names = _parameters_read(network, steps)
    if not names:
        return False
    parameters = {id(tensor_at(network, name)) for name in names}
    read_by_modules, read_by_code = _names_read_elsewhere(network, steps)
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if id(parameter) not in parameters:
            continue
        if name in read_by_code:
            return False
        owner, _, _ = name.rpartition(".")
        if owner in read_by_modules:
            return False
    return True


def _names_read_elsewhere(network: GraphModule, steps: list[Node]) -> tuple[set[str], set[str]]:
    """The modules that a network calls, and the parameters and buffers that its own code reads but
    in these steps."""
    modules = set()
    tensors = set()
    for node in network.graph.nodes:
        if node.op == "call_module":
            modules.add(str(node.target))
        elif node.op == "get_attr" and node not in steps:
            tensors.add(str(node.target))
    return modules, tensors


def _replace(network: GraphModule, weight: Node, steps: list[Node]) -> bool:
    """Holds the weight in the place of a parameter that it is made of, the first of its shape if
    there is one; whether that was done: only where the weight is the same each time that it is
    computed."""
    value = _computed(network, weight, steps)
    again = _computed(network, weight, steps)
    if not isinstance(value, Tensor):
        return False
    if not torch.equal(value, again):
        return False
    names = _parameters_read(network, steps)
    kept = _first_of_shape(network, names, value.shape)
    with network.graph.inserting_before(weight):
        held = network.graph.get_attr(kept)
    held.meta = dict(weight.meta)
    weight.replace_all_uses_with(held)
    for node in reversed(steps):
        network.graph.erase_node(node)
    for name in set(names):
        if name != kept:
            delete_tensor(network, name)
    parameter = nn.Parameter(value.clone())
    set_tensor(network, kept, parameter)
    return True


def _first_of_shape(network: GraphModule, names: list[str], shape: torch.Size) -> str:
    """The first of these parameters that is of this shape; the first of all if none is."""
    for name in names:
        parameter = tensor_at(network, name)
        if parameter.shape == shape:
            return name
    return names[0]


def _parameters_read(network: GraphModule, steps: list[Node]) -> list[str]:
    """The names of the parameters that nodes read."""
    found = []
    for node in steps:
        if node.op != "get_attr":
            continue
        name = str(node.target)
        tensor = tensor_at(network, name)
        if isinstance(tensor, nn.Parameter):
            found.append(name)
    return found


def _computed(network: GraphModule, weight: Node, steps: list[Node]) -> Any:
    values: dict[Node, Any] = {}
    for node in steps:
        values[node] = _result(network, node, values)
    return values[weight]


def _result(network: GraphModule, node: Node, values: dict[Node, Any]) -> Any:
    """What a node makes of the `values` of others."""
    target = node.target
    if node.op == "get_attr":
        return tensor_at(network, str(target))
    before = (node.args, node.kwargs)
    args, kwargs = fx.node.map_arg(before, values.__getitem__)
    if node.op == "call_method":
        owner, *rest = args
        method = getattr(owner, str(target))
        return method(*rest, **kwargs)
    assert callable(target)
    return target(*args, **kwargs)
