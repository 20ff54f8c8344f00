"""The layers that layer and node penalties act on."""

from torch import fx

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
from slimfront.trainables.structure.targets.zeros import is_activation, passes_units


def inner_layers(graph: fx.GraphModule) -> list[Layer]:
    """Layers that layer sparsity can make inactive: non-negative input, and an output that goes
    only into a ReLU."""
    nonnegative = nonnegative_nodes(graph)
    return [
        x
        for x in layers_of(graph)
        if x.node.args[0] in nonnegative and is_relu(graph, only_user(x.last))
    ]


def hidden_layers(graph: fx.GraphModule) -> list[Layer]:
    """Layers whose units can be removed one by one: their output goes only into a ReLU, or through
    another activation that makes 0 of 0 into one layer that reads all of them."""
    counts = call_counts(graph)

    def is_hidden(layer: Layer) -> bool:
        after = only_user(layer.last)
        if is_relu(graph, after):
            return True
        if after is None or not is_activation(graph, after):
            return False
        reader = only_user(after)
        while reader is not None and (passes_units(graph, reader) or is_flatten(graph, reader)):
            reader = only_user(reader)
        reading = weight_layer(graph, reader)
        return reader is not None and reading is not None and counts[reader.target] == 1

    return [layer for layer in layers_of(graph) if is_hidden(layer)]
