"""What whole layers are judged by, before one of them is taken out."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from torch.fx import GraphModule, Node

from slimfront.trainables.compaction.whole_layers import WholeLayer
from slimfront.trainables.errors import UserError
from slimfront.trainables.options import suggest
from slimfront.trainables.structure.graph import ancestors

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of outputs and targets, a mean over the batch."""


class Batch(NamedTuple):
    """Inputs (N, …), and targets (N, …) where there are any."""

    inputs: Tensor
    targets: Any = None


Ends = tuple[Node, Node]
"""The node that is passed on, and the node whose place it takes for the rest of the network."""
Nodes = set[Node]


class Criterion(ABC):
    """Says what each layer is worth; the one that is worth least goes, and the others are judged
    anew in the network that is left."""

    how: ClassVar[str]
    """What it goes by, in words that follow "by"."""

    def __init__(
        self,
        graph: GraphModule,  # noqa: ARG002 - some compare with it
        batches: Sequence[Batch],
        loss: Loss | None,
    ) -> None:
        """
        Args:
            graph: the network before anything goes, in evaluation mode.
            batches: what it is judged on, with targets where there is a loss.
            loss: a function of outputs and targets that gives a mean over the batch.

        Raises:
            UserError: if it needs what is not given.
        """
        self.batches = batches
        self.loss = loss

    @abstractmethod
    def worth(self, graph: GraphModule, layers: Sequence[WholeLayer]) -> list[float]:
        """One number for each layer of the network as it is now; infinite for what it has no
        opinion of."""

    @abstractmethod
    def told(self, worth: float) -> str:
        """What the worth of a layer that went means, in words."""


OUTPUTS = "outputs"
"""The criterion if none is named."""
CRITERIA: dict[str, type[Criterion]] = {}
"""By the name that users call them."""


def criterion(name: str) -> Callable[[type[Criterion]], type[Criterion]]:
    """Class decorator: adds one to `CRITERIA`."""

    def add(cls: type[Criterion]) -> type[Criterion]:
        CRITERIA[name] = cls
        return cls

    return add


def find_criterion(name: str) -> type[Criterion]:
    """The criterion of a name. Raises UserError, with a suggestion, if there is none."""
    if name not in CRITERIA:
        hint = suggest(name, CRITERIA)
        raise UserError(f"there is no criterion '{name}'; {hint}")
    return CRITERIA[name]


def finite(worth: float) -> float:
    """What is no number, because outputs overflow without the layer, is worth the most."""
    if math.isfinite(worth):
        return worth
    return math.inf


def ends(layer: WholeLayer) -> Iterator[Ends]:
    """Where a layer begins and ends."""
    passes = layer.passes
    for node, source in passes.items():
        is_inside = all(user in passes for user in node.users)
        if is_inside:
            continue
        while source in passes:
            source = passes[source]
        yield source, node


def within(layer: WholeLayer) -> list[Node]:
    """The nodes that compute the layer, in order of execution: what its end needs, and its
    beginning does not."""
    found: Nodes = set()
    for source, node in ends(layer):
        before = ancestors(source)
        found |= ancestors(node) - before
    return sorted(found)
