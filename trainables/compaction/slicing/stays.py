"""What stays of each tensor of a network when some of its units go."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slimfront.trainables.structure.coupling.known import Known, found_in
from slimfront.trainables.structure.coupling.units import NONE, packed_shape
from slimfront.trainables.structure.coupling.walk import Walk


class CannotSlice(Exception):
    """The code of a node has a size in it that cannot be changed."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.name)
        self.node = node


@dataclass(frozen=True)
class Slices:
    """A network, what is known of it, and which of its units go."""

    network: GraphModule
    walk: Walk
    gone: Tensor
    """(units,) bool."""
    by_inputs: dict[Node, Any]
    """The nodes that make numbers which follow from how many inputs there are, or from their sizes,
    with those of three inputs; what is known is of two."""

    def known(self, node: Node) -> Any:
        """What is known of what a node makes: a number, or `Known` in the place of a tensor."""
        return self.walk.known[node]

    def known_input(self, node: Node) -> Any:
        """What is known of the first input of a node."""
        first = node.all_input_nodes[0]
        return self.known(first)

    def counted_units(self, name: str) -> Iterator[Tensor]:
        """The units of the inputs that a node or layer of this name counts."""
        counted = self.walk.counts.get(name, [])
        for _, units in counted:
            yield units

    def kept(self, units: Tensor) -> Tensor:
        """Which entries stay, for units of any shape."""
        no_unit = units == NONE
        goes = self.gone[units]
        return no_unit | ~goes

    def mask(self, known: Known) -> Tensor:
        """Which entries of a tensor stay, of size 1 where all are alike."""
        all_alike = [1] * known.dim
        found = torch.ones(all_alike, dtype=torch.bool)
        for unit_map in known.unit_maps:
            kept = self.kept(unit_map)
            found = found & kept
        return found

    def shape(self, known: Known) -> tuple[int, ...]:
        """The shape that a tensor will have."""
        mask = self.mask(known)
        return packed_shape(known.shape, mask)

    def kept_along(self, known: Known, axis: int) -> Tensor:
        """Which places along an axis have anything that stays: (size,)."""
        found = self.mask(known)
        for other in range(known.dim):
            if other != axis:
                found = found.any(dim=other, keepdim=True)
        size = known.shape[axis]
        return found.reshape(-1).expand(size)

    def old_width(self, query: Known, heads_before: int = 1, heads_left: int = 1) -> int | None:
        """How wide each head of queries was, if it becomes narrower; None if not."""
        *_, before = query.shape
        *_, left = self.shape(query)
        width_before = before // heads_before
        width_left = left // heads_left
        if width_left == width_before:
            return None
        return width_before


def has_tensors(value: Any) -> bool:
    """Whether there is a tensor within nested values."""
    return any(True for _ in found_in(value))
