"""How often the activations of a layer change sides: those that are always on, or always off, are
linear, and a layer of such is worth little."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from slimfront.trainables.compaction.whole_layers import WholeLayer, is_activation
from slimfront.trainables.post_training.depth.base import Criterion, criterion, within
from slimfront.trainables.post_training.depth.features import features_at


@criterion("entropy")
class Entropy(Criterion):
    """The mean entropy, in bits, of whether the input of an activation is positive: over examples
    and places for each unit, then over the units of the layer (Liao et al. 2023, Can unstructured
    pruning reduce the depth in deep neural networks?, arXiv 2308.06619, eq. 4). A layer without an
    activation is not judged."""

    how = "the entropy of their activations"

    def worth(self, graph: fx.GraphModule, layers: Sequence[WholeLayer]) -> list[float]:
        """From 0 to 1; one run of the network judges all layers."""
        read = [_read_by_activations(graph, layer) for layer in layers]
        nodes = {node for found in read for node in found}
        features = features_at(graph, nodes, self.batches)
        return [_entropy(found, features) for found in read]

    def told(self, worth: float) -> str:
        """The entropy itself."""
        return f"the entropy of its activations is {worth:.3f} bits"


def _read_by_activations(graph: fx.GraphModule, layer: WholeLayer) -> list[fx.Node]:
    return [node.all_input_nodes[0] for node in within(layer) if is_activation(graph, node)]


def _entropy(nodes: Sequence[fx.Node], features: Sequence[dict[fx.Node, Tensor]]) -> float:
    if not nodes:
        return float("inf")
    found = []
    for node in nodes:
        if any(node not in heard for heard in features):
            return float("inf")
        positive = torch.cat([_by_unit(heard[node]) > 0 for heard in features], dim=1)
        found.append(_bits(positive.double().mean(1)))
    return float(torch.cat(found).mean())


def _by_unit(features: Tensor) -> Tensor:
    """(units, all else): units are the second axis of features (N, C, *places)."""
    if features.ndim == 1:
        return features[None]
    return features.transpose(0, 1).flatten(1)


def _bits(share: Tensor) -> Tensor:
    """The entropy of something that happens with these probabilities."""
    nats: Tensor = -torch.special.xlogy(share, share) - torch.special.xlogy(1 - share, 1 - share)
    return nats / math.log(2)
