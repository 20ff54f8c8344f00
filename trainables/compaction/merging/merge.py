"""Layer merging: an inactive layer's ReLU does nothing, so the layer becomes part of the next one
(arXiv 2006.15604)."""

from collections import Counter
from typing import Literal

from torch import nn
from torch.fx import GraphModule, Node

from slimfront.trainables.compaction.layers import (
    bypass,
    count_weights,
    is_denser,
    nonnegative_when_trained,
    set_called,
)
from slimfront.trainables.compaction.merging.products import (
    are_one,
    parameters_of_product,
    product,
)
from slimfront.trainables.structure.graph import (
    WeightLayer,
    call_counts,
    is_relu,
    module_of,
    only_user,
    weight_layer,
)

MergePolicy = Literal["always", "smaller", "never"]


def drop_idle_relus(graph: GraphModule) -> list[str]:
    """Takes out every ReLU whose input is non-negative for every input of the network. Returns what
    fed them, by name."""
    nonnegative = nonnegative_when_trained(graph)
    dropped = []
    for node in list(graph.graph.nodes):
        if not is_relu(graph, node):
            continue
        source = node.args[0]
        if source not in nonnegative:
            continue
        name = source.name
        if source.op == "call_module":
            name = str(source.target)
        dropped.append(name)
        bypass(graph, node)
    return dropped


def merge_layers(
    graph: GraphModule, policy: MergePolicy, *, approximate: bool = False
) -> tuple[list[str], list[str]]:
    """Replaces a layer that feeds only another layer by their product, where that is exact, as the
    policy says.

    Linear layers always merge exactly, and convolutions where no padding lies between them (see
    `product`), but only where the product has at most as many weights as the two, whatever the
    policy.

    Args:
        policy: "always", for the fewest layers; "smaller", only where the product has at most as
            many weights, and as many non-zero ones, as the two layers (the product of sparse
            matrices is denser than they are, and that of a bottleneck larger); or "never".
        approximate: whether convolutions also merge where only the border of the image comes out
            differently.

    Returns:
        Names of the layers that went into the next one, and of those that could have, but would
        have cost more.
    """
    merged: list[str] = []
    kept: list[str] = []
    if policy == "never":
        return merged, kept
    counts = call_counts(graph)
    for node in list(graph.graph.nodes):
        following = _next_layer(graph, node, counts)
        first = weight_layer(graph, node, grouped=True)
        second = weight_layer(graph, following, grouped=True)
        if following is None or first is None or second is None:
            continue
        if not are_one(first, second, moves_padding=approximate):
            continue
        name = str(node.target)
        combined = _within(policy, first, second, moves_padding=approximate)
        if combined is None:
            kept.append(name)
            continue
        set_called(graph, following, combined)
        bypass(graph, node)
        merged.append(name)
    return merged, kept


def _within(
    policy: MergePolicy, first: WeightLayer, second: WeightLayer, *, moves_padding: bool
) -> WeightLayer | None:
    """The product of two layers; None where it has more weights than the policy allows."""
    apart = count_weights(first) + count_weights(second)
    is_larger = parameters_of_product(first, second) > apart
    may_be_larger = policy == "always" and isinstance(second, nn.Linear)
    if is_larger and not may_be_larger:
        return None  # before it is multiplied, which may take long
    combined = product(first, second, moves_padding=moves_padding)
    assert combined is not None
    if policy == "smaller" and is_denser(combined, first, second):
        return None
    return combined


def _next_layer(graph: GraphModule, node: Node, counts: Counter[object]) -> Node | None:
    """The layer node that alone reads this layer node's output, seen through nodes that pass it on
    unchanged."""
    if weight_layer(graph, node, grouped=True) is None:
        return None
    if counts[node.target] > 1:
        return None
    reader = only_user(node)
    while isinstance(module_of(graph, reader), nn.Identity | nn.Dropout):
        assert reader is not None
        reader = only_user(reader)
    if reader is None or weight_layer(graph, reader, grouped=True) is None:
        return None
    if counts[reader.target] > 1:
        return None
    return reader
