"""What is known of a tensor in a network: its shape, the units of its entries, and which of them
are 0 for every input."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimfront.trainables.structure.coupling.units import NONE


@dataclass(frozen=True)
class Known:
    """A tensor of a network."""

    shape: torch.Size
    unit_maps: tuple[Tensor, ...] = ()
    """The numbers of units, each of as many axes as `shape` and of size 1 along those where all
    entries are alike; −1 where an entry is of no unit. Each is of other axes: channels, heads."""
    zero: Tensor | None = None
    """Which entries are 0 for every input, as `unit_maps`; None if none is."""
    value: Tensor | None = None
    """What it is, where that depends on no input and no parameter."""

    @property
    def dim(self) -> int:
        """How many axes it has."""
        return len(self.shape)

    def zeros(self) -> Tensor:
        """`zero` as a tensor."""
        if self.zero is not None:
            return self.zero
        return torch.zeros([1] * self.dim, dtype=torch.bool)

    def along(self, axis: int) -> tuple[Tensor, ...]:
        """The unit maps that vary along an axis."""
        return tuple(unit_map for unit_map in self.unit_maps if unit_map.shape[axis] > 1)

    def but(self, axis: int) -> tuple[Tensor, ...]:
        """The unit maps that do not vary along an axis."""
        return tuple(unit_map for unit_map in self.unit_maps if unit_map.shape[axis] == 1)

    def zero_along(self, axis: int) -> Tensor:
        """Which places along an axis are 0 everywhere else: (size,)."""
        zeros = self.zeros()
        others = [other for other in range(self.dim) if other != axis % self.dim]
        found = zeros.all(dim=tuple(others)) if others else zeros
        return found.reshape(-1).expand(self.shape[axis])

    def with_zero(self, zero: Tensor | None) -> "Known":
        """The same with other zeros."""
        return replace(self, zero=zero if zero is not None and bool(zero.any()) else None)


def is_unit_map(units: Tensor) -> bool:
    """Whether units vary along an axis, and there are any."""
    return units.numel() > 1 and bool((units != NONE).any())


def compressed(tensor: Tensor) -> Tensor:
    """A tensor with size 1 along the axes where all entries are alike."""
    for axis in range(tensor.dim()):
        if tensor.shape[axis] > 1:
            first = tensor.narrow(axis, 0, 1)
            if bool((tensor == first).all()):
                tensor = first
    return tensor.contiguous()


def varying(units: Tensor) -> frozenset[int]:
    """The axes along which units vary."""
    return frozenset(axis for axis, size in enumerate(units.shape) if size > 1)
