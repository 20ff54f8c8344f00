"""What is known of a tensor in a network: its shape, the units of its entries, and which of them
are 0 for every input."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

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

    @property
    def last_axis(self) -> int:
        """The number of its last axis."""
        return len(self.shape) - 1

    def zeros(self) -> Tensor:
        """`zero` as a tensor."""
        if self.zero is not None:
            return self.zero
        shape = [1] * self.dim
        return torch.zeros(shape, dtype=torch.bool)

    def along(self, axis: int) -> tuple[Tensor, ...]:
        """The unit maps that vary along an axis."""
        found = []
        for unit_map in self.unit_maps:
            if unit_map.shape[axis] > 1:
                found.append(unit_map)
        return tuple(found)

    def but(self, axis: int) -> tuple[Tensor, ...]:
        """The unit maps that do not vary along an axis."""
        found = []
        for unit_map in self.unit_maps:
            if unit_map.shape[axis] == 1:
                found.append(unit_map)
        return tuple(found)

    def without_units(self, axis: int) -> "Known":
        """The same without the unit maps that vary along an axis."""
        return Known(
            shape=self.shape,
            unit_maps=self.but(axis),
            zero=self.zero,
        )

    def zero_along(self, axis: int) -> Tensor:
        """Which places along an axis are 0 everywhere else: (size,)."""
        found = all_but(self.zeros(), axis)
        size = self.shape[axis]
        return found.expand(size)

    def zero_over(self, axes: Iterable[int]) -> Tensor | None:
        """Where all entries over some axes are 0, with size 1 along those; None if none is."""
        if self.zero is None:
            return None
        return self.zero.all(dim=tuple(axes), keepdim=True)

    def with_zero(self, zero: Tensor | None) -> "Known":
        """The same with other zeros."""
        if zero is None or not zero.any():
            return replace(self, zero=None)
        return replace(self, zero=zero)


def is_unit_map(units: Tensor) -> bool:
    """Whether units vary along an axis, and there are any."""
    if units.numel() <= 1:
        return False
    are_units = units != NONE
    return bool(are_units.any())


def compressed(tensor: Tensor) -> Tensor:
    """A tensor with size 1 along the axes where all entries are alike."""
    for axis in range(tensor.dim()):
        if tensor.shape[axis] <= 1:
            continue
        first = tensor.narrow(axis, 0, 1)
        all_alike = (tensor == first).all()
        if bool(all_alike):
            tensor = first
    return tensor.contiguous()


def varying(units: Tensor) -> frozenset[int]:
    """The axes along which units vary."""
    axes = set()
    for axis, size in enumerate(units.shape):
        if size > 1:
            axes.add(axis)
    return frozenset(axes)


def along(units: Tensor, axis: int, dim: int) -> Tensor:
    """Units (n,) along an axis of a tensor of `dim` axes."""
    shape = [1] * dim
    shape[axis] = len(units)
    return units.reshape(shape)


def all_but(entries: Tensor, axis: int) -> Tensor:
    """Which places along an axis are true everywhere else: (size,)."""
    others = list(range(entries.dim()))
    others.pop(axis)
    if others:  # torch takes no axes for all of them
        entries = entries.all(dim=tuple(others))
    return entries.reshape(-1)


def found_in(value: Any) -> Iterable[Known]:
    """What is known of tensors within nested values."""
    if isinstance(value, Known):
        yield value
        return
    items: Iterable[Any] = ()
    if isinstance(value, dict):
        items = value.values()
    elif isinstance(value, slice):
        items = (
            value.start,
            value.stop,
            value.step,
        )
    elif isinstance(value, list | tuple):
        items = value
    for item in items:
        yield from found_in(item)


def has_tensors(value: Any) -> bool:
    """Whether there is a tensor within nested values."""
    return any(True for _ in found_in(value))


def mapped_known(value: Any, change: Callable[[Known], Any]) -> Any:
    """Nested values with what is known of tensors changed."""
    if isinstance(value, Known):
        return change(value)
    if isinstance(value, dict):
        changed = {}
        for key, item in value.items():
            changed[key] = mapped_known(item, change)
        return changed
    if not isinstance(value, list | tuple):
        return value
    items = [mapped_known(item, change) for item in value]
    if isinstance(value, tuple):
        return tuple(items)
    return items
