"""How often the activations of a layer change sides: those that are always on, or always off, are
linear, and a layer of such is worth little."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slimfront.trainables.compaction.whole_layers import WholeLayer
from slimfront.trainables.depth.base import Criterion, Nodes, criterion, within
from slimfront.trainables.depth.features import Features, features_at
from slimfront.trainables.structure.graph import module_of
from slimfront.trainables.structure.targets.activations import is_elementwise
from slimfront.trainables.torch_internals import function_name

_OF_FEATURES = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
_FUNCTIONS_OF_FEATURES = ("linear", "addmm", "layer_norm", "rms_norm")


@criterion("entropy")
class Entropy(Criterion):
    """The mean entropy, in bits, of whether the input of an activation is positive: over examples
    and places for each unit, a channel or a feature of tokens, then over the units of the layer
    (Liao et al. 2023, Can unstructured pruning reduce the depth in deep neural networks?, arXiv
    2308.06619, eq. 4). A layer without an activation is not judged."""

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
        return [_entropy(graph, by_layer, features) for by_layer in read]

    def told(self, worth: float) -> str:
        """The entropy itself."""
        return f"the entropy of its activations is {worth:.3f} bits"


def _read_by_activations(graph: GraphModule, layer: WholeLayer) -> list[Node]:
    read = []
    for node in within(layer):
        if is_elementwise(graph, node):
            read.append(node.all_input_nodes[0])
    return read


def _entropy(graph: GraphModule, nodes: Sequence[Node], features: Sequence[Features]) -> float:
    if not nodes:
        return math.inf
    found = []
    for node in nodes:
        axis = _axis_of_units(graph, node)
        positive = []
        for heard in features:
            if node not in heard:
                return math.inf
            by_unit = _by_unit(heard[node], axis)
            positive.append(by_unit > 0)
        of_all = torch.cat(positive, dim=1)
        share = of_all.double().mean(1)
        bits = _bits(share)
        found.append(bits)
    of_units = torch.cat(found)
    return float(of_units.mean())


def _axis_of_units(graph: GraphModule, node: Node) -> int:
    """Along which axis the units of a node's features lie: the last one where a linear layer or a
    norm of features made them, else the second, as of channels."""
    current: Node | None = node
    while current is not None:
        module = module_of(graph, current)
        name = function_name(current) if module is None else ""
        if isinstance(module, _OF_FEATURES) or name in _FUNCTIONS_OF_FEATURES:
            return -1
        if module is not None and next(module.parameters(), None) is not None:
            return 1
        current = next(iter(current.all_input_nodes), None)
    return 1


def _by_unit(features: Tensor, axis: int) -> Tensor:
    """(units, all else): units are that axis of features (N, C, *places) or (N, *places, C)."""
    if features.ndim == 1:
        return features[None]
    return features.movedim(axis, 0).flatten(1)


def _bits(share: Tensor) -> Tensor:
    """The entropy of something that happens with these probabilities."""
    other = 1 - share
    of_share: Tensor = torch.special.xlogy(share, share)
    of_other: Tensor = torch.special.xlogy(other, other)
    nats = -of_share - of_other
    return nats / math.log(2)
