"""Node sparsity: pushes single units and channels to zero, so that compaction removes them.

Group lasso over the rows of [W | b] (arXiv 2006.15604, section 2, sets Σ_j r_j ‖W^j‖_{2,1} beside
layer sparsity). The bias belongs to the row, since a unit with zero weights and a bias still
outputs a constant.
"""

from torch import Tensor, nn

from slimfront.trainables.penalties.base import (
    PENALTIES,
    ActiveGroups,
    GroupPenalty,
    root,
    shrink_factor,
)
from slimfront.trainables.structure.graph import Layer
from slimfront.trainables.structure.targets.layers import hidden_layers
from slimfront.trainables.structure.tracing.trace import trace


def row_norms(weight: Tensor, bias: Tensor) -> Tensor:
    """ℓ2 norms of the rows of [W | b]: `weight` (out, in, …), `bias` (out), to (out). The gradient
    of a zero row is 0."""
    entries = weight.flatten(1)
    of_weights = entries.square().sum(1)
    squares = of_weights + bias.square()
    return root(squares)


def row_factors(weight: Tensor, bias: Tensor, threshold: Tensor) -> Tensor:
    """What the proximal operator of `threshold` · Σ ‖row‖₂ multiplies each row by: max(0, 1 −
    threshold / ‖row‖), (out)."""
    norms = row_norms(weight, bias)
    return shrink_factor(norms, threshold)


@PENALTIES.register("node")
class NodeSparsity(GroupPenalty):
    """Node sparsity; `strength` is λ. It acts on layers whose output goes only into a ReLU, or
    through another activation that makes 0 of 0 into one layer, as if batch norms were folded."""

    nothing_to_do = (
        "there is no layer in this network that feeds only a ReLU, or another activation before "
        "one layer that reads it"
    )

    def attach(self, model: nn.Module, sample: Tensor) -> ActiveGroups[Layer]:
        graph = trace(model, sample)
        layers = hidden_layers(graph)
        groups = {layer.name: layer for layer in layers}
        return ActiveGroups(self, groups, _norm, _shrink)


def _norm(layer: Layer) -> Tensor:
    weight, bias = layer.folded()
    norms = row_norms(weight, bias)
    return norms.sum()


def _shrink(layer: Layer, threshold: Tensor) -> None:
    weight, bias = layer.folded()
    factors = row_factors(weight, bias, threshold)
    layer.scale_rows(factors)
