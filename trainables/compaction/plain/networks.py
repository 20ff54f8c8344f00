"""Traced networks as plain data and tensors."""

from typing import Any

from torch import fx
from torch.fx import GraphModule, Node

from slimfront.trainables.compaction.plain.arguments import (
    Plain,
    argument_from_plain,
    argument_to_plain,
    arguments_from_plain,
    arguments_to_plain,
)
from slimfront.trainables.compaction.plain.checking import OPERATIONS, check_plain
from slimfront.trainables.compaction.plain.modules import (
    module_to_plain,
    modules_from_plain,
    tensor_to_plain,
    tie,
)
from slimfront.trainables.compaction.quick import make_quick
from slimfront.trainables.structure import operations

FORMAT = 2


def serialise(network: GraphModule) -> Plain:
    """A traced network as a dictionary of plain data and tensors.

    Raises:
        ValueError: if the network holds a module or an operation that is none of `operations`.
    """
    modules: dict[str, Plain] = {}
    places: dict[int, str] = {}
    nodes = []
    for node in network.graph.nodes:
        target, values = _operation(node)
        if node.op == "call_module" and target not in modules:
            module = network.get_submodule(target)
            modules[target] = module_to_plain(module, target)
            tie(modules[target], module, target, places)
        elif node.op == "get_attr":
            modules[target] = tensor_to_plain(network, target)
        stored = {
            "name": node.name,
            "op": node.op,
            "target": target,
            "args": [argument_to_plain(value) for value in values],
            "kwargs": arguments_to_plain(node.kwargs),
        }
        nodes.append(stored)
    return {
        "format": FORMAT,
        "modules": modules,
        "nodes": nodes,
    }


def _operation(node: Node) -> tuple[str, tuple[Any, ...]]:
    """The name of what a node does, and what it does it with.

    Raises:
        ValueError: if it is none of `operations`.
    """
    if node.op == "call_function":
        return _function(node)
    target = str(node.target)
    if node.op == "call_method" and target not in operations.methods():
        raise _cannot_store(f"the operation '{node.name}' (.{target})")
    if node.op not in OPERATIONS:
        raise _cannot_store(f"'{node.name}' ({node.op} {target})")
    return target, node.args


def _function(node: Node) -> tuple[str, tuple[Any, ...]]:
    """The name of a function, and its arguments; of `getattr`, the name of the attribute."""
    target = node.target
    if target is getattr:
        owner, attribute, *_ = node.args
        if attribute in operations.ATTRIBUTES:
            return str(attribute), (owner,)
    name = operations.name_of(target)
    if name is None:
        raise _cannot_store(f"the operation '{node.name}' ({target})")
    return name, node.args


def _cannot_store(what: str) -> ValueError:
    return ValueError(f"cannot store {what} as plain data")


def deserialise(plain: Plain) -> GraphModule:
    """The network that `serialise` stored, in evaluation mode on the CPU, with bit-identical
    weights.

    Raises:
        ValueError: if the data is of another format.
    """
    stored_format = plain.get("format")
    if stored_format != FORMAT:
        raise ValueError(
            f"this network is stored in format {stored_format}, and this version reads "
            f"format {FORMAT}"
        )
    check_plain(plain)
    root = modules_from_plain(plain["modules"])
    graph = fx.Graph()
    made: dict[str, Node] = {}
    for stored in plain["nodes"]:
        name = stored["name"]
        made[name] = _node_from_plain(graph, stored, made)
    return make_quick(GraphModule(root, graph)).eval()


def _node_from_plain(graph: fx.Graph, stored: Plain, made: dict[str, Node]) -> Node:
    """Adds a node to a graph; those that it reads were `made` before, by name."""
    operation = stored["op"]
    target = stored["target"]
    args = [argument_from_plain(value, made) for value in stored["args"]]
    if operation == "call_function":
        if target in operations.ATTRIBUTES:
            args.append(target)
            target = getattr
        else:
            target = operations.function_of(target)
    return graph.create_node(
        op=operation,
        target=target,
        args=tuple(args),
        kwargs=arguments_from_plain(stored["kwargs"], made),
        name=stored["name"],
    )
