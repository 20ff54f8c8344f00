"""Empty residual blocks: a branch that adds nothing is taken out."""

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import GraphModule, Node

from slimfront.trainables.structure.targets.branches import Branch, residual_branches


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


def _first_empty(graph: GraphModule, inputs: Tensor) -> Branch | None:
    """The first branch that adds nothing to a shortcut of its own shape."""
    empty = []
    for branch in residual_branches(graph):
        if branch.is_zero(graph):
            empty.append(branch)
    if not empty:
        return None
    shapes = Shapes(graph).of(inputs)
    for branch in empty:
        if shapes[branch.shortcut] == shapes[branch.addition]:
            return branch
    return None


class Shapes(fx.Interpreter):
    """Runs a graph and remembers the shapes and types that its nodes make."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[Node, object] = {}

    def of(self, inputs: Tensor) -> dict[Node, object]:
        """Shape and type of every node's tensor for a batch of two, if there are so many
        `inputs`."""
        self.run(inputs[:2].clone())
        return self.found

    def run_node(self, n: Node) -> Any:
        """Runs one operation."""
        made = super().run_node(n)
        self.found[n] = None
        if isinstance(made, Tensor):
            shape = tuple(made.shape)
            self.found[n] = shape, made.dtype
        return made
