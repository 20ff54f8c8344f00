"""Layer sparsity: pushes whole layers to have no negative entry, so that they merge into the next one.

Hebiri, Lederer: Layer Sparsity in Neural Networks, arXiv 2006.15604: Σ_j r_j ‖neg(W^j)‖_F with neg(a) = min(a, 0).
With biases a layer is inactive only if its bias is non-negative too, so [W | b] is one group here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainables.graph import inner_layers, trace
from trainables.penalties.base import PENALTIES, Penalty


def negative_norm(tensors: Sequence[Tensor]) -> Tensor:
    """‖neg(·)‖ of several tensors taken as one group: the square root of the sum of squared negative entries; a scalar."""
    return torch.stack([t.clamp(max=0).square().sum() for t in tensors]).sum().sqrt()


def shrink_negative(tensors: Sequence[Tensor], threshold: Tensor) -> list[Tensor]:
    """Proximal operator of `threshold` · ‖neg(·)‖ on a group of tensors.

    The negative part is scaled by max(0, 1 − threshold / ‖neg‖), the positive part stays. The two parts have disjoint
    support, so the problem splits, and the negative part is a group soft-threshold.

    Args:
        tensors: the group, any shapes; usually [W, b].
        threshold: η·λ, a scalar ≥ 0.

    Returns:
        New tensors of the same shapes. NaN in, NaN out.
    """
    norm = negative_norm(tensors)
    scale = (1 - threshold / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp(min=0)
    return [torch.where(t < 0, t * scale, t) for t in tensors]


@PENALTIES.register("layer")
class LayerSparsity(Penalty):
    """Layer sparsity by its proximal operator after each optimiser step; `strength` is λ, the step size is η.

    It acts on the inner layers: linear layers with a non-negative input and an output that goes only into a ReLU.
    """

    def attach(self, model: nn.Module, sample: Tensor) -> "ActiveLayerSparsity":
        groups = [
            [layer.layer.weight] if layer.layer.bias is None else [layer.layer.weight, layer.layer.bias]
            for layer in inner_layers(trace(model))
        ]
        return ActiveLayerSparsity(groups, self)


class ActiveLayerSparsity:
    """Layer sparsity on the groups [W | b] of one network."""

    def __init__(self, groups: list[list[Tensor]], options: LayerSparsity) -> None:
        self.groups = groups
        self.options = options

    def before_batch(self, step: int) -> None:
        """Nothing to prepare."""

    def loss(self) -> Tensor | None:
        """None: the proximal step does the work."""
        return None

    @torch.no_grad()
    def proximal(self, step_size: float) -> None:
        """One proximal step with threshold `step_size` · strength on each group, in place."""
        for group in self.groups:
            threshold = step_size * self.options.tensor(group[0])
            for parameter, shrunk in zip(group, shrink_negative(group, threshold), strict=True):
                parameter.copy_(shrunk)

    def close(self) -> None:
        """Nothing was attached."""
