"""Block sparsity: pushes whole residual branches to zero, so that their blocks become the identity
and are removed.

Group lasso with one group per residual branch: the affine part (γ, β) of its last norm, or [W | b]
of its last layer where there is none. That group alone decides how much the branch adds: the
weights in front of a norm have no scale. Dropout, gates and layer scales may lie behind it.

With a `cost`, λ of a branch is multiplied by the root of the size of its group (Yuan & Lin 2006,
Model selection and estimation in regression with grouped variables, eq. 2.3) and by what the branch
costs, each relative to the mean over branches, so that of two that are worth as much the one that
costs more goes first.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

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
from slimfront.trainables.sparsifiers.unit_costs import uses_of_weights
from slimfront.trainables.structure.graph import tensor_at
from slimfront.trainables.structure.targets.branches import branches_that_can_go
from slimfront.trainables.structure.tracing.shapes import shapes_of
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
    their last weight layer; `cost` says what they are weighed by, if by anything."""

    nothing_to_do = "there is no residual branch in this network"

    cost: Literal["none", "flops", "params"] = "none"

    def attach(self, model: nn.Module, sample: Tensor) -> ActiveGroups[Branch]:
        graph = trace(model, sample)
        groups = {}
        within = {}
        shapes = shapes_of(graph, sample)
        for branch in branches_that_can_go(graph, shapes):
            refs = [parameter_ref(model, name) for name in branch.parameters]
            groups[branch.name] = refs
            within[branch.name] = branch.nodes()
        factors: dict[str, float] = {}
        if self.cost != "none":
            prices = None
            if self.cost == "flops":
                prices = uses_of_weights(model, sample[:2])
            factors = _factors(graph, groups, within, prices)
        return ActiveGroups(self, groups, _norm, _shrink, factors=factors)


def _factors(
    graph: GraphModule,
    groups: Mapping[str, Branch],
    within: Mapping[str, set[Node]],
    prices: Mapping[str, float] | None,
) -> dict[str, float]:
    """What λ of each branch is multiplied by; `prices` are of an entry of each parameter, by its
    name, and 1 without them."""
    costs: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for name, branch in groups.items():
        costs[name] = _cost(graph, within[name], prices)
        entries = sum(parameter.tensor.numel() for parameter in branch)
        sizes[name] = math.sqrt(entries)
    factors = {}
    for name in groups:
        factors[name] = _relative(sizes, name) * _relative(costs, name)
    return factors


def _relative(numbers: Mapping[str, float], name: str) -> float:
    """One of several numbers, relative to their mean; 1 where all are 0."""
    total = sum(numbers.values())
    return numbers[name] * len(numbers) / total if total else 1.0


def _cost(graph: GraphModule, nodes: set[Node], prices: Mapping[str, float] | None) -> float:
    """What the parameters that these nodes read cost together."""
    found: dict[str, Tensor] = {}
    for node in nodes:
        if node.op == "call_module":
            module = graph.get_submodule(str(node.target))
            for leaf, parameter in module.named_parameters():
                found[f"{node.target}.{leaf}"] = parameter
        elif node.op == "get_attr":
            held = tensor_at(graph, str(node.target))
            if isinstance(held, nn.Parameter):
                found[str(node.target)] = held
    if prices is None:
        return sum(parameter.numel() for parameter in found.values())
    return sum(parameter.numel() * prices.get(name, 0.0) for name, parameter in found.items())


def _norm(branch: Branch) -> Tensor:
    tensors = [parameter.tensor for parameter in branch]
    return group_norm(tensors)


@torch.no_grad()
def _shrink(branch: Branch, threshold: Tensor) -> None:
    tensors = [parameter.tensor for parameter in branch]
    shrunk = shrink_group(tensors, threshold)
    for tensor, smaller in zip(tensors, shrunk, strict=True):
        tensor.copy_(smaller)
