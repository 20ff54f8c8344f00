"""How often the activations of a layer change sides: those that are always on, or always off, are
linear, and a layer of such is worth little."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slimfront.trainables.compaction.whole_layers import WholeLayer, is_activation
from slimfront.trainables.depth.base import Criterion, Nodes, criterion, within
from slimfront.trainables.depth.features import Features, features_at


@criterion("entropy")
class Entropy(Criterion):
    """The mean entropy, in bits, of whether the input of an activation is positive: over examples
    and places for each unit, then over the units of the layer (Liao et al. 2023, Can unstructured
    pruning reduce the depth in deep neural networks?, arXiv 2308.06619, eq. 4). A layer without an
    activation is not judged."""

    how = "the entropy of their activations"

    def worth(self, graph: GraphModule, layers: Sequence[WholeLayer]) -> list[float]:
        """From 0 to 1; one run of the network judges all layers."""
        read = []
        nodes: Nodes = set()
        for layer in layers:
            by_layer = _read_by_activations(graph, layer)
            read.append(by_layer)
            nodes.update(by_layer)
        features = features_at(graph, nodes, self.batches)
        return [_entropy(by_layer, features) for by_layer in read]

    def told(self, worth: float) -> str:
        """The entropy itself."""
        return f"the entropy of its activations is {worth:.3f} bits"


def _read_by_activations(graph: GraphModule, layer: WholeLayer) -> list[Node]:
    read = []
    for node in within(layer):
        if is_activation(graph, node):
            read.append(node.all_input_nodes[0])
    return read


def _entropy(nodes: Sequence[Node], features: Sequence[Features]) -> float:
    if not nodes:
        return math.inf
    found = []
    for node in nodes:
        positive = []
        for heard in features:
            if node not in heard:
                return math.inf
            by_unit = _by_unit(heard[node])
            positive.append(by_unit > 0)
        of_all = torch.cat(positive, dim=1)
        share = of_all.double().mean(1)
        bits = _bits(share)
        found.append(bits)
    of_units = torch.cat(found)
    return float(of_units.mean())


def _by_unit(features: Tensor) -> Tensor:
    """(units, all else): units are the second axis of features (N, C, *places)."""
    if features.ndim == 1:
        return features[None]
    return features.transpose(0, 1).flatten(1)


def _bits(share: Tensor) -> Tensor:
    """The entropy of something that happens with these probabilities."""
    other = 1 - share
    of_share: Tensor = torch.special.xlogy(share, share)
    of_other: Tensor = torch.special.xlogy(other, other)
    nats = -of_share - of_other
    return nats / math.log(2)
