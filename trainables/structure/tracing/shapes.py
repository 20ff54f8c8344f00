"""The shapes that a network makes on its way."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import GraphModule, Node

from slimfront.trainables.tasks.evaluating import evaluating

NodeShapes = Mapping[Node, tuple[tuple[int, ...], torch.dtype] | None]
"""Shape and type of the tensor that each node makes; None if it makes something else."""


def shapes_of(graph: GraphModule, inputs: Tensor) -> NodeShapes:
    """The shapes for a batch of two, if there are so many `inputs` (N, *input_shape); in evaluation
    mode, so that nothing in the network changes."""
    running = _Running(graph)
    two = inputs[:2]
    with torch.no_grad(), evaluating(graph):
        running.run(two.clone())
    return running.found


class _Running(fx.Interpreter):
    """Runs a graph and remembers the shapes and types that its nodes make."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[Node, tuple[tuple[int, ...], torch.dtype] | None] = {}

    def run_node(self, n: Node) -> Any:
        """Runs one operation."""
        made = super().run_node(n)
        self.found[n] = None
        if isinstance(made, Tensor):
            self.found[n] = tuple(made.shape), made.dtype
        return made
