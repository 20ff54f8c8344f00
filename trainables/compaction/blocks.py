"""Empty residual blocks: a branch that adds nothing is taken out."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slimfront.trainables.structure.coupling.graph_of_units import units_of
from slimfront.trainables.structure.coupling.known import Known
from slimfront.trainables.structure.graph import ancestors, is_addition, module_of
from slimfront.trainables.structure.targets.branches import Branch, keeps_shape, residual_branches
from slimfront.trainables.structure.tracing.shapes import shapes_of


@torch.no_grad()
def drop_empty_branches(graph: GraphModule, inputs: Tensor) -> list[str]:
    """Replaces `shortcut + branch` by `shortcut` where the branch's last layer, or the norm behind
    it, is all zero.

    A shortcut that the addition would broadcast to the shape of the branch keeps it; `inputs` (N,
    *input_shape) show that. Returns the names of those last layers; what fed them is dead code
    then, and goes with the next clean-up.
    """
    dropped: list[str] = []
    while True:
        # One at a time: the next branch's shortcut may be the addition that goes.
        branch = _first_empty(graph, inputs)
        if branch is None:
            return dropped
        branch.addition.replace_all_uses_with(branch.shortcut)
        graph.graph.erase_node(branch.addition)
        graph.graph.eliminate_dead_code()
        dropped.append(branch.name)


@torch.no_grad()
def drop_zero_summands(graph: GraphModule, inputs: Tensor) -> list[str]:
    """Replaces `x + y` by `x` where `y` is zero for every input, whatever it is that makes it so: a
    gate, or a layer scale. Returns the names of the layers, or operations, that made such ones."""
    if not _has_zero_parameter(graph):
        return []
    two = torch.arange(2) % len(inputs)
    graph.recompile()
    known = units_of(graph, inputs[two]).known
    dropped = []
    for node in list(graph.graph.nodes):
        sides = node.all_input_nodes
        if not is_addition(graph, node) or len(sides) != 2:
            continue
        for zero, other in (sides, sides[::-1]):
            if not _is_zero(known[zero]) or known[other].shape != known[node].shape:
                continue
            node.replace_all_uses_with(other)
            graph.graph.erase_node(node)
            dropped.append(_maker(graph, zero))
            break
    if dropped:
        graph.graph.eliminate_dead_code()
    return dropped


def _has_zero_parameter(graph: GraphModule) -> bool:
    """Whether all of a parameter of more than one number is zero, but for biases."""
    for name, parameter in graph.named_parameters():
        if name.endswith("bias") or parameter.numel() <= 1:
            continue
        if not parameter.any():
            return True
    return False


def _is_zero(known: Any) -> bool:
    """Whether a tensor is known to be zero everywhere."""
    return isinstance(known, Known) and known.zero is not None and bool(known.zero.all())


def _maker(graph: GraphModule, node: Node) -> str:
    """The name of the last layer that led to a tensor, or of the operation that made it."""
    for source in sorted(ancestors(node), reverse=True):
        module = module_of(graph, source)
        if module is not None and next(module.parameters(), None) is not None:
            return str(source.target)
    return node.name


def _first_empty(graph: GraphModule, inputs: Tensor) -> Branch | None:
    """The first branch that adds nothing to a shortcut of its own shape."""
    empty = [branch for branch in residual_branches(graph) if branch.is_zero(graph)]
    if not empty:
        return None
    shapes = shapes_of(graph, inputs)
    can_go = [branch for branch in empty if keeps_shape(branch, shapes)]
    return can_go[0] if can_go else None
