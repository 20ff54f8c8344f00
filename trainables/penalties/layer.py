"""Layer sparsity: pushes whole layers to have no negative entry, so that they merge into the next
one.

Hebiri, Lederer: Layer Sparsity in Neural Networks, arXiv 2006.15604: Σ_j r_j ‖neg(W^j)‖_F with
neg(a) = min(a, 0). With biases a layer is inactive only if its bias is non-negative too, so [W | b]
is one group here, as it would be with the batch norm folded in.
"""

from functools import reduce

import torch
from torch import Tensor, nn

from slimfront.trainables.penalties.base import (
    PENALTIES,
    ActiveGroups,
    GroupPenalty,
    Tensors,
    root,
    shrink_factor,
)
from slimfront.trainables.structure.graph import Layer
from slimfront.trainables.structure.targets.layers import inner_layers
from slimfront.trainables.structure.tracing.trace import trace


def negative_norm(tensors: Tensors) -> Tensor:
    """‖neg(·)‖ of several tensors taken as one group: the square root of the sum of squared
    negative entries; a scalar.

    Its gradient is 0 where there is no negative entry.
    """
    squares = []
    for tensor in tensors:
        negative = tensor.clamp(max=0)
        squares.append(negative.square().sum())
    total = torch.stack(squares).sum()
    return root(total)


def shrink_negative(tensors: Tensors, threshold: Tensor) -> list[Tensor]:
    """Proximal operator of `threshold` · ‖neg(·)‖ on a group of tensors.

    The negative part is scaled by max(0, 1 − threshold / ‖neg‖), the positive part stays. The two
    parts have disjoint support, so the problem splits, and the negative part is a group
    soft-threshold.

    Args:
        tensors: the group, any shapes; usually [W, b].
        threshold: η·λ, a scalar ≥ 0.

    Returns:
        New tensors of the same shapes. NaN in, NaN out.
    """
    negative = [tensor.clamp(max=0) for tensor in tensors]
    norms = [torch.linalg.vector_norm(part) for part in negative]
    norm = reduce(torch.hypot, norms)
    scale = shrink_factor(norm, threshold)
    # In few operations, which packs pay for: where the scale is 0, t − t is exactly 0, and without
    # a negative part t stays.
    shrunk = []
    for tensor, part in zip(tensors, negative, strict=True):
        smaller = torch.addcmul(tensor, part, scale - 1)
        shrunk.append(smaller)
    return shrunk


@PENALTIES.register("layer")
class LayerSparsity(GroupPenalty):
    """Layer sparsity; `strength` is λ.

    It acts on the inner layers, found by tracing: linear and convolutional layers with a
    non-negative input and an output that goes only into a ReLU, through a batch norm or not.
    """

    nothing_to_do = "there is no layer in this network that stands between two ReLUs"

    def attach(self, model: nn.Module, sample: Tensor) -> ActiveGroups[Layer]:
        graph = trace(model, sample)
        layers = inner_layers(graph)
        groups = {layer.name: layer for layer in layers}
        return ActiveGroups(self, groups, _norm, _shrink)


def _norm(layer: Layer) -> Tensor:
    tensors = layer.folded()
    return negative_norm(tensors)


def _shrink(layer: Layer, threshold: Tensor) -> None:
    tensors = layer.folded()
    weight, bias = shrink_negative(tensors, threshold)
    layer.write_folded(weight, bias)
