"""Block sparsity: pushes whole residual branches to zero, so that their blocks become the identity
and are removed.

Group lasso with one group per residual branch: the affine part (γ, β) of its last norm, or [W | b]
of its last layer where there is none. That group alone decides how much the branch adds: the
weights in front of a norm have no scale. Dropout, gates and layer scales may lie behind it.
"""

import torch
from torch import Tensor, nn

from slimfront.trainables.penalties.base import (
    PENALTIES,
    ActiveGroups,
    GroupPenalty,
    ParameterRef,
    Tensors,
    parameter_ref,
    root,
    shrink_factor,
)
from slimfront.trainables.structure.targets.branches import residual_branches
from slimfront.trainables.structure.tracing.trace import trace


def group_norm(tensors: Tensors) -> Tensor:
    """ℓ2 norm of several tensors taken as one vector; a scalar. The gradient of a zero group is
    0."""
    squares = []
    for tensor in tensors:
        of_tensor = tensor.square().sum()
        squares.append(of_tensor)
    total = torch.stack(squares).sum()
    return root(total)


def shrink_group(tensors: Tensors, threshold: Tensor) -> list[Tensor]:
    """Proximal operator of `threshold` · ‖group‖₂: every tensor times max(0, 1 − threshold /
    ‖group‖). NaN in, NaN out."""
    norm = group_norm(tensors)
    factor = shrink_factor(norm, threshold)
    return [tensor * factor for tensor in tensors]


Branch = list[ParameterRef]
"""The parameters by which a residual branch can become zero."""


@PENALTIES.register("block")
class BlockSparsity(GroupPenalty):
    """Block sparsity; `strength` is λ. It acts on residual branches, found by tracing, named by
    their last weight layer."""

    nothing_to_do = "there is no residual branch in this network"

    def attach(self, model: nn.Module, sample: Tensor) -> ActiveGroups[Branch]:
        graph = trace(model, sample)
        groups = {}
        for branch in residual_branches(graph):
            refs = [parameter_ref(model, name) for name in branch.parameters]
            groups[branch.name] = refs
        return ActiveGroups(self, groups, _norm, _shrink)


def _norm(branch: Branch) -> Tensor:
    tensors = [parameter.tensor for parameter in branch]
    return group_norm(tensors)


@torch.no_grad()
def _shrink(branch: Branch, threshold: Tensor) -> None:
    tensors = [parameter.tensor for parameter in branch]
    shrunk = shrink_group(tensors, threshold)
    for tensor, smaller in zip(tensors, shrunk, strict=True):
        tensor.copy_(smaller)
