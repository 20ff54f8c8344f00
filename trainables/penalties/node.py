"""Node sparsity: pushes single units and channels to zero, so that compaction removes them.

Group lasso over the rows of [W | b] (arXiv 2006.15604, section 2, sets Σ_j r_j ‖W^j‖_{2,1} beside
layer sparsity). The bias belongs to the row, since a unit with zero weights and a bias still
outputs a constant.
"""

import torch
from torch import Tensor, nn

from slimfront.trainables.penalties.base import PENALTIES, ActiveGroups, GroupPenalty
from slimfront.trainables.structure.graph import Layer, hidden_layers, trace


def row_norms(weight: Tensor, bias: Tensor) -> Tensor:
    """ℓ2 norms of the rows of [W | b]: `weight` (out, in, …), `bias` (out), to (out). The gradient
    of a zero row is 0."""
    squares = weight.flatten(1).square().sum(1) + bias.square()
    return torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)


def row_factors(weight: Tensor, bias: Tensor, threshold: Tensor) -> Tensor:
    """What the proximal operator of `threshold` · Σ ‖row‖₂ multiplies each row by: max(0, 1 −
    threshold / ‖row‖), (out)."""
    norms = row_norms(weight, bias)
    return (1 - threshold / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(min=0)


@PENALTIES.register("node")
class NodeSparsity(GroupPenalty):
    """Node sparsity; `strength` is λ. It acts on layers whose output goes only into a ReLU, as if
    batch norms were folded."""

    nothing_to_do = "there is no layer in this network that feeds only a ReLU"

    def attach(self, model: nn.Module, sample: Tensor) -> ActiveGroups[Layer]:
        groups = {layer.name: layer for layer in hidden_layers(trace(model, sample))}

        def shrink(layer: Layer, threshold: Tensor) -> None:
            layer.scale_rows(row_factors(*layer.folded(), threshold))

        return ActiveGroups(self, groups, lambda layer: row_norms(*layer.folded()).sum(), shrink)
