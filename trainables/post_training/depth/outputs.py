"""How much the outputs of the network change without a layer."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from slimfront.trainables.compaction.whole_layers import WholeLayer, Without
from slimfront.trainables.post_training.batches import Batch
from slimfront.trainables.post_training.depth.base import OUTPUTS, Criterion, criterion, finite
from slimfront.trainables.post_training.scores import Loss
from slimfront.trainables.torch_internals import flattened

Leaves = list[Tensor]
"""The tensors of what a network gives for a batch."""


@criterion(OUTPUTS)
class Outputs(Criterion):
    """The sum of squares of the difference to the outputs of the whole network, relative to the sum
    of squares of their own deviation from their mean over the batch."""

    how = "how much the outputs change"

    def __init__(self, graph: fx.GraphModule, batches: Sequence[Batch], loss: Loss | None) -> None:
        super().__init__(graph, batches, loss)
        self.wanted = [_leaves(graph(batch.inputs)) for batch in batches]

    def worth(self, graph: fx.GraphModule, layers: Sequence[WholeLayer]) -> list[float]:
        """As a share; needs one run of the network for each layer."""
        return [self._change(graph, layer) for layer in layers]

    def _change(self, graph: fx.GraphModule, layer: WholeLayer) -> float:
        apart = 0.0
        spread = 0.0
        for batch, right in zip(self.batches, self.wanted, strict=True):
            outputs = Without(graph, layer).run(batch.inputs)
            for one, other in zip(_leaves(outputs), right, strict=True):
                apart += _sum_of_squares(one - other)
                mean = other.mean(0, keepdim=True)
                spread += _sum_of_squares(other - mean)
        return finite(apart / max(spread, 1e-30))

    def told(self, worth: float) -> str:
        """The root of the share, in percent."""
        return f"the outputs change by {math.sqrt(worth):.1%}"


def _sum_of_squares(tensor: Tensor) -> float:
    return float(tensor.square().sum())


def _leaves(outputs: Any) -> Leaves:
    """The tensors of real numbers among outputs, in float32 or more."""
    leaves, _ = flattened(outputs)
    found = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            continue
        is_wide = leaf.dtype == torch.float64
        found.append(leaf if is_wide else leaf.float())
    return found
