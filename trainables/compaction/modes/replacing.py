"""Calls of modules in the place of calls of functions."""

import copy
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node


def replace_call(network: GraphModule, node: Node, name: str, inputs: Any) -> None:
    """Calls the module of this name with `inputs` in the place of a function, in place."""
    with network.graph.inserting_before(node):
        called = network.graph.call_module(name, inputs)
    called.meta = copy.copy(node.meta)
    node.replace_all_uses_with(called)
    network.graph.erase_node(node)


def add_module(network: GraphModule, wanted: str, module: nn.Module) -> str:
    """Adds a module by a `wanted` name, or one with a number behind it; the name."""
    name = wanted
    number = 0
    while hasattr(network, name):
        name = f"{wanted}_{number}"
        number += 1
    network.add_submodule(name, module)
    return name
