"""Indices and bounds in a network's code, counted among what stays."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from slimfront.trainables.compaction.slicing.stays import CannotSlice, Slices
from slimfront.trainables.structure.coupling.known import Known


@dataclass(frozen=True)
class Bounds:
    """Those that a node takes a part of a tensor by."""

    slices: Slices
    node: Node
    known: Known
    """What is known of the tensor."""

    def of_call(self, name: str, args: list[Any]) -> list[Any]:
        """The arguments of `slice`, `narrow` and `select`: a tensor, an axis, and bounds.

        Raises:
            CannotSlice: if they are in another form.
        """
        if self.node.kwargs:
            raise CannotSlice(self.node)
        if len(args) < 2:
            raise CannotSlice(self.node)
        tensor, given_axis, *bounds = args
        axis = given_axis % self.known.dim
        kept = self.slices.kept_along(self.known, axis)
        if kept.all():
            return args
        if name == "select":
            counted = [self._counted(kept, bounds[0])]
        elif name == "narrow":
            counted = self._narrowed(kept, *bounds)
        else:
            counted = self._sliced(kept, *bounds)
        return [tensor, given_axis, *counted]

    def _narrowed(self, kept: Tensor, start: Any, length: Any) -> list[Any]:
        if isinstance(start, Node) or isinstance(length, Node):
            raise CannotSlice(self.node)
        first = self._counted(kept, start)
        end = self._counted(kept, start + length)
        return [first, end - first]

    def _sliced(
        self, kept: Tensor, start: Any = None, stop: Any = None, step: Any = 1
    ) -> list[Any]:
        if step != 1:
            raise CannotSlice(self.node)
        return [
            self._counted(kept, start),
            self._counted(kept, stop),
        ]

    def of_index(self, index: Any) -> Any:
        """What stands in brackets: a part for each axis, or one for the first.

        Raises:
            CannotSlice: if a part is neither a number nor a range, and its axis becomes smaller.
        """
        if not isinstance(index, tuple):
            (part,) = self._parts((index,))
            return part
        return self._parts(index)

    def _parts(self, index: tuple[Any, ...]) -> tuple[Any, ...]:
        passed_over = self.known.dim
        for part in index:
            if part is not None and part is not Ellipsis:
                passed_over -= 1
        new: list[Any] = []
        axis = 0
        for part in index:
            if part is None:
                new.append(part)
            elif part is Ellipsis:
                new.append(part)
                axis += passed_over
            else:
                new.append(self._part(axis, part))
                axis += 1
        return tuple(new)

    def _part(self, axis: int, part: Any) -> Any:
        kept = self.slices.kept_along(self.known, axis)
        if kept.all():
            return part
        if isinstance(part, int):
            return self._counted(kept, part)
        if not isinstance(part, slice):
            raise CannotSlice(self.node)
        if part.step not in (None, 1):
            raise CannotSlice(self.node)
        start = self._counted(kept, part.start)
        stop = self._counted(kept, part.stop)
        return slice(start, stop, part.step)

    def _counted(self, kept: Tensor, bound: Any) -> Any:
        """How many places before one stay."""
        if bound is None:
            return None
        if isinstance(bound, Node):
            if bound in self.slices.by_inputs:
                raise CannotSlice(self.node)
            bound = self.slices.known(bound)
        if bound >= len(kept):
            return bound
        return int(kept[:bound].sum())
