"""Which outputs within a network are never negative."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from slimfront.trainables.structure.graph import SHAPES, arguments, calls, is_addition, is_relu

# Dropout's outputs are its inputs, zeroed or scaled up; pooling takes means and maxima. All of them
# keep a sign.
_SIGN_KEEPERS: tuple[object, ...] = (
    *SHAPES,
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    F.dropout,
    nn.MaxPool1d,
    nn.AvgPool1d,
    nn.AdaptiveAvgPool1d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.MaxPool3d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool3d,
    F.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
)


def nonnegative_nodes(
    graph: GraphModule, inactive: Callable[[Node], bool] = lambda _: False
) -> set[Node]:
    """Nodes whose output is non-negative for every input of the network.

    Only the structure counts, so that the answer holds for any weights, unless `inactive` says of a
    node that it calls a layer whose present weights keep a non-negative input non-negative.
    """
    found: set[Node] = set()
    for node in graph.graph.nodes:
        if is_relu(graph, node):
            found.add(node)
        elif _keeps_sign(graph, node) or inactive(node):
            sources = _sources(node)
            if sources and found.issuperset(sources):
                found.add(node)
    return found


def _sources(node: Node) -> list[Node]:
    """The nodes among what a node is given."""
    found = []
    for argument in arguments(node):
        if isinstance(argument, Node):
            found.append(argument)
    return found


def _keeps_sign(graph: GraphModule, node: Node) -> bool:
    if calls(graph, node, _SIGN_KEEPERS):
        return True
    return is_addition(graph, node)
