"""The layers that layer and node penalties act on."""

from torch import nn
from torch.fx import GraphModule, Node

from slimfront.trainables.structure.graph import (
    Layer,
    call_counts,
    is_flatten,
    is_relu,
    layers_of,
    only_user,
    weight_layer,
)
from slimfront.trainables.structure.signs import nonnegative_nodes
from slimfront.trainables.structure.targets.activations import is_elementwise
from slimfront.trainables.structure.targets.zeros import is_activation, passes_units


def inner_layers(graph: GraphModule) -> list[Layer]:
    """Layers that layer sparsity can make inactive: non-negative input, and an output that goes
    only into a ReLU."""
    nonnegative = nonnegative_nodes(graph)
    found = []
    for layer in layers_of(graph):
        source = layer.node.args[0]
        reader = only_user(layer.last)
        if source in nonnegative and is_relu(graph, reader):
            found.append(layer)
    return found


def hidden_layers(graph: GraphModule) -> list[Layer]:
    """Layers whose units can be removed one by one: their output goes only into a ReLU, or through
    another activation into one layer that reads all of them, a linear one if the activation makes
    anything else of 0."""
    counts = call_counts(graph)
    found = []
    for layer in layers_of(graph):
        after = only_user(layer.last)
        if after is None:
            continue
        if is_relu(graph, after):
            found.append(layer)
        elif is_activation(graph, after) or is_elementwise(graph, after):
            reader = _reader(graph, after)
            following = weight_layer(graph, reader)
            if reader is None or following is None or counts[reader.target] > 1:
                continue
            if is_activation(graph, after) or isinstance(following, nn.Linear):
                found.append(layer)
    return found


def _reader(graph: GraphModule, node: Node) -> Node | None:
    """The one node that reads a node's output, or what leaves that as it is but for its shape; None
    if there are more or none."""
    reader = only_user(node)
    while reader is not None:
        passes_on = passes_units(graph, reader) or is_flatten(graph, reader)
        if not passes_on:
            return reader
        reader = only_user(reader)
    return None
