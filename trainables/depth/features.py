"""What a network computes at some of its nodes."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, fx
from torch.fx import GraphModule, Node

from slimfront.trainables.depth.base import Batch

Features = dict[Node, Tensor]
"""What nodes computed of one batch, (N, …) each."""


def features_at(
    graph: GraphModule, nodes: Collection[Node], batches: Sequence[Batch]
) -> list[Features]:
    """For each batch the tensors (N, …) of these nodes; a node that gives anything else has
    none."""
    found = []
    for batch in batches:
        listening = _Listening(graph, nodes)
        listening.run(batch.inputs.clone())
        found.append(listening.heard)
    return found


class _Listening(fx.Interpreter):
    def __init__(self, graph: GraphModule, nodes: Collection[Node]) -> None:
        super().__init__(graph)
        self.nodes = nodes
        self.heard: Features = {}

    def run_node(self, n: Node) -> Any:
        made = super().run_node(n)
        if n not in self.nodes:
            return made
        if isinstance(made, Tensor) and made.is_floating_point():
            self.heard[n] = made.detach().float()
        return made
