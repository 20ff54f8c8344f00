"""What a network computes at some of its nodes."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, fx

from slimfront.trainables.depth.base import Batch

Features = dict[fx.Node, Tensor]
"""What nodes computed of one batch, (N, …) each."""


def features_at(
    graph: fx.GraphModule, nodes: Collection[fx.Node], batches: Sequence[Batch]
) -> list[Features]:
    """For each batch the tensors (N, …) of these nodes; a node that gives anything else has
    none."""
    found = []
    for batch in batches:
        listening = _Listening(graph, nodes)
        listening.run(batch.inputs)
        found.append(listening.heard)
    return found


class _Listening(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, nodes: Collection[fx.Node]) -> None:
        super().__init__(graph)
        self.nodes = nodes
        self.heard: Features = {}

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if n not in self.nodes:
            return made
        if isinstance(made, Tensor) and made.is_floating_point():
            self.heard[n] = made.detach().float()
        return made
