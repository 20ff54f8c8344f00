"""How much the outputs of the network change without a layer."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from slimfront.trainables.compaction.whole_layers import WholeLayer, Without
from slimfront.trainables.depth.base import OUTPUTS, Batch, Criterion, Loss, criterion, finite
from slimfront.trainables.torch_internals import flattened

Leaves = list[Tensor]
"""The tensors of what a network gives for a batch."""


@criterion(OUTPUTS)
class Outputs(Criterion):
    """The sum of squares of the difference to the outputs of the whole network, relative to the sum
    of squares of their own deviation from their mean over the batch."""

    how = "how much the outputs change"

    def __init__(self, graph: GraphModule, batches: Sequence[Batch], loss: Loss | None) -> None:
        super().__init__(graph, batches, loss)
        self.wanted = []
        for batch in batches:
            outputs = graph(batch.inputs.clone())
            leaves = _leaves(outputs)
            self.wanted.append(leaves)

    def worth(self, graph: GraphModule, layers: Sequence[WholeLayer]) -> list[float]:
        """As a share; needs one run of the network for each layer."""
        return [self._change(graph, layer) for layer in layers]

    def _change(self, graph: GraphModule, layer: WholeLayer) -> float:
        apart = 0.0
        spread = 0.0
        without = Without(graph, layer)
        for batch, whole in zip(self.batches, self.wanted, strict=True):
            outputs = without.run(batch.inputs.clone())
            leaves = _leaves(outputs)
            for now, before in zip(leaves, whole, strict=True):
                change = now - before
                apart += _sum_of_squares(change)
                mean = before.mean(0, keepdim=True)
                deviation = before - mean
                spread += _sum_of_squares(deviation)
        divisor = max(spread, 1e-30)
        return finite(apart / divisor)

    def told(self, worth: float) -> str:
        """The root of the share, in percent."""
        change = math.sqrt(worth)
        return f"the outputs change by {change:.1%}"


def _sum_of_squares(tensor: Tensor) -> float:
    squares = tensor.square()
    return float(squares.sum())


def _leaves(outputs: Any) -> Leaves:
    """The tensors of real numbers among outputs, in float32 or more."""
    leaves, _ = flattened(outputs)
    found = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            continue
        if not leaf.is_floating_point():
            continue
        if leaf.dtype != torch.float64:
            leaf = leaf.float()
        found.append(leaf)
    return found
