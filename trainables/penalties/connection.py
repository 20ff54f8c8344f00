"""Connection sparsity: pushes single weights to zero.

The lasso (arXiv 2006.15604, section 2, sets Σ_j r_j ‖W^j‖_1 beside layer sparsity). Biases are
free.
"""

import torch
from torch import Tensor, nn

from slimfront.trainables.penalties.base import (
    PENALTIES,
    ActiveGroups,
    GroupPenalty,
    ParameterRef,
    parameter_ref,
)
from slimfront.trainables.sparsifiers.base import prunable_weights


def soft_threshold(weight: Tensor, threshold: Tensor) -> Tensor:
    """Proximal operator of `threshold` · ‖·‖₁: sign(w) · max(0, |w| − threshold), any shape. NaN
    in, NaN out."""
    # `clamp` with tensors is slower.
    clamped = torch.maximum(weight, -threshold)
    clamped = torch.minimum(clamped, threshold)
    return weight - clamped


@torch.no_grad()
def soft_threshold_(weight: Tensor, threshold: float) -> None:
    """The same in place, in one operation."""
    nn.functional.softshrink(weight, threshold, out=weight)  # type: ignore[call-arg]


@PENALTIES.register("connection")
class ConnectionSparsity(GroupPenalty):
    """Connection sparsity; `strength` is λ. It acts on the weights of all linear and convolutional
    layers; needs no tracing."""

    def attach(self, model: nn.Module, sample: Tensor) -> ActiveGroups[ParameterRef]:
        groups = {}
        for name in prunable_weights(model):
            layer = name.removesuffix(".weight")
            groups[layer] = parameter_ref(model, name)

        def norm(weight: ParameterRef) -> Tensor:
            sizes = weight.tensor.abs()
            return sizes.sum()

        @torch.no_grad()
        def shrink(weight: ParameterRef, threshold: Tensor) -> None:
            tensor = weight.tensor
            smaller = soft_threshold(tensor, threshold)
            tensor.copy_(smaller)

        return ActiveGroups(self, groups, norm, shrink, shrink_entries=soft_threshold_)
