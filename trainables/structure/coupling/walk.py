"""A walk over a traced network that finds its units, and what its handlers may ask of it and tell
it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slimfront.trainables.structure.coupling.known import (
    Known,
    compressed,
    found_in,
    has_tensors,
    is_unit_map,
    varying,
)
from slimfront.trainables.structure.coupling.units import NONE, Units
from slimfront.trainables.structure.graph import module_of, submodule

BATCH = 2
"""How many inputs a walk is of."""
Handler = Callable[["Walk", "Call"], Any]
"""What a handler is: of the walk and a call, it returns what is known of the call's output, or
`NotImplemented`."""


@dataclass(frozen=True)
class Call:
    """What a node calls, and with what: `Known` in the places of tensors."""

    node: Node
    args: Sequence[Any]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the layer that a node calls."""
        return str(self.node.target)

    @property
    def input(self) -> Any:
        """The first argument."""
        return self.args[0]

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument, by place or by name."""
        if len(self.args) > place:
            return self.args[place]
        return self.kwargs.get(name, default)

    def named(self, *names: str) -> dict[str, Any]:
        """The arguments by name: those that are given by place have these names, in this order."""
        by_place = dict(zip(names, self.args, strict=False))
        return by_place | self.kwargs


@dataclass
class Walk:
    """A traced network, and what is known of each of its nodes."""

    graph: GraphModule
    units: Units = field(default_factory=Units)
    known: dict[Node, Any] = field(default_factory=dict)
    counts: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    """The nodes and layers, by name, that count their inputs, as a mean and a layer norm do, with
    the axis and the units along it."""
    tensors: dict[str, list[Tensor | None]] = field(default_factory=dict)
    """The units along each axis of parameters and buffers, by name."""
    made: dict[Node, Any] = field(default_factory=dict)
    """What each node makes: numbers, and the shapes of tensors."""
    elsewhere: list[dict[Node, Any]] = field(default_factory=list)
    """The same for inputs of other sizes, as far as the network takes them."""
    groups: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """The units that grouped convolutions read and write, by name: (groups, in), (groups, out)."""
    unknown: list[str] = field(default_factory=list)
    """The nodes whose kind no handler knows, or not in this form."""
    writing: set[tuple[str, int]] = field(default_factory=set)
    """The axes of parameters, by name, along which they make units, and do not only read them."""
    _names: dict[int, str] = field(default_factory=dict)
    """The first name of each parameter and buffer, by identity."""

    def tensor(self, name: str, axis: int, units: Tensor | None, *, reads: bool = False) -> None:
        """Notes the units along an axis of a parameter or buffer, which it makes, or `reads`; None:
        all of it stays. What it has been noted for elsewhere goes together."""
        tensor = _get(self.graph, name)
        name = self._names.setdefault(id(tensor), name)
        if not reads:
            self.writing.add((name, axis))
        if name not in self.tensors:
            not_noted = torch.full((0,), NONE)
            self.tensors[name] = [not_noted] * tensor.dim()
        noted = self.tensors[name]
        before = noted[axis]
        if before is not None:
            nothing_to_note = tensor.shape[axis] == 0
            was_noted = nothing_to_note or before.numel() > 0
            if not was_noted:
                noted[axis] = units
                return
            if units is not None:
                self.units.tie(before, units)
                return
        noted[axis] = None
        for stays in (before, units):
            if stays is not None:
                self.units.keep(stays, f"'{name}' is used elsewhere too")

    def units_of(self, name: str, axis: int) -> Tensor | None:
        """The units along an axis of a parameter that were noted before."""
        tensor = _get(self.graph, name)
        first_name = self._names.get(id(tensor), name)
        noted = self.tensors.get(first_name)
        if noted is None:
            return None
        units = noted[axis]
        if units is None:
            return None
        if units.numel() != tensor.shape[axis]:
            return None
        return units

    def keep_parameters(self, module: Any, name: str) -> None:
        """Has all parameters and buffers of a module stay as they are."""
        held = [
            *module.named_parameters(),
            *module.named_buffers(),
        ]
        for leaf, tensor in held:
            for axis in range(tensor.dim()):
                self.tensor(f"{name}.{leaf}", axis, None)

    def count(self, name: str, axis: int, units: Tensor) -> None:
        """Notes that a node or layer counts its inputs along an axis, of these units."""
        noted = self.counts.setdefault(name, [])
        noted.append((axis, units))

    def varies(self, value: Any) -> bool:
        """Whether a node makes other numbers of inputs of other sizes; False for what is none."""
        if not isinstance(value, Node) or has_tensors(self.made[value]):
            return False
        return any(there[value] != self.made[value] for there in self.elsewhere)

    def shape_of(self, node: Node) -> torch.Size | None:
        """The shape of what a node makes; None if that is not one tensor."""
        made = self.made[node]
        if isinstance(made, Known):
            return made.shape
        return None

    def moved(self, known: Known, move: Callable[[Tensor], Tensor]) -> Known:
        """What a move of entries makes of a tensor; `move` takes tensors of its shape, in
        float64."""

        def moved_entries(entries: Tensor) -> Tensor:
            full = entries.expand(known.shape)
            return move(full.double())

        unit_maps = []
        shape = None
        for unit_map in known.unit_maps:
            # From 1 on: what is padded with 0 is of no unit.
            full = moved_entries(unit_map + 1)
            shape = full.shape
            made = compressed(full.long() - 1)
            if is_unit_map(made):
                unit_maps.append(made)
            else:
                self.units.keep(made, "it is taken out alone")
        zero = None
        if known.zero is not None:
            full = moved_entries(known.zero)
            shape = full.shape
            zero = compressed(full != 0)
        if shape is None:
            full = moved_entries(torch.zeros(1))
            shape = full.shape
        for unit_map in unit_maps:
            if len(varying(unit_map)) > 1:
                self.units.pack(unit_map)
        return Known(
            shape=shape,
            unit_maps=self.apart(unit_maps),
            zero=zero,
        )

    def apart(self, unit_maps: Iterable[Tensor]) -> tuple[Tensor, ...]:
        """Unit maps of one tensor, none of which vary along the same axis: those that do are made
        one where they agree, and stay where they do not."""
        found: list[Tensor] = []
        for unit_map in unit_maps:
            axes = varying(unit_map)
            meets = []
            others = []
            for other in found:
                if varying(other) & axes:
                    meets.append(other)
                else:
                    others.append(other)
            if not meets:
                found.append(unit_map)
            elif len(meets) == 1:
                made_one = self._made_one(meets[0], unit_map)
                found = [*others, made_one]
            else:
                for stays in (unit_map, *meets):
                    self.units.keep(stays, "it meets others in several ways")
        return tuple(found)

    def _made_one(self, one: Tensor, other: Tensor) -> Tensor:
        """One unit map of two that vary along a common axis."""
        axes = varying(one)
        other_axes = varying(other)
        if axes == other_axes:
            self.units.tie(one, other)
            is_none = one == NONE
            return torch.where(is_none, other, one)
        if axes < other_axes:
            self._all_of_places(one, other)
            return other
        if other_axes < axes:
            self._all_of_places(other, one)
            return one
        for stays in (one, other):
            self.units.keep(stays, "it meets another in part")
        return one

    def _all_of_places(self, coarse: Tensor, fine: Tensor) -> None:
        """Has each unit of a `coarse` map go with all units of a `fine` one, which varies along
        more axes, at its place."""
        axes = varying(coarse)
        shape = [1] * fine.dim()
        for axis in axes:
            shape[axis] = fine.shape[axis]
        places = coarse.expand(shape)
        members = by_place(fine, axes)
        self.units.same_as_all(places.reshape(-1), members)

    def all_or_none(self, unit_map: Tensor, axis: int, why: str) -> Tensor | None:
        """Has the units along an axis go as a whole; the unit map of the other axes, or None if
        there is none, and they stay."""
        if unit_map.shape[axis] == 1:
            return unit_map
        axes = varying(unit_map)
        if len(axes) == 1:
            self.units.keep(unit_map, why)
            return None
        first = unit_map.narrow(axis, 0, 1)
        self.units.tie(unit_map, first)
        return first

    def all_or_none_of(self, unit_map: Tensor, axes: Iterable[int], why: str) -> Tensor | None:
        """The same along several axes."""
        left: Tensor | None = unit_map
        for axis in axes:
            if left is None:
                return None
            left = self.all_or_none(left, axis, why)
        return left

    def left_of(
        self, unit_maps: Iterable[Tensor], axes: Sequence[int], why: str
    ) -> tuple[Tensor, ...]:
        """The same of several unit maps: those that there are of the other axes."""
        found = []
        for unit_map in unit_maps:
            left = self.all_or_none_of(unit_map, axes, why)
            if left is not None:
                found.append(left)
        return tuple(found)

    def stay(self, value: Any, why: str) -> None:
        """Has all units stay of tensors within nested values."""
        for known in found_in(value):
            for unit_map in known.unit_maps:
                self.units.keep(unit_map, why)

    def zero_of(self, run: Callable[[Tensor], Any], dim: int) -> bool:
        """Whether an operation on each entry makes 0 of 0."""
        axes = max(dim, 1)
        zeros = torch.zeros([1] * axes)
        try:
            with torch.no_grad():
                made = run(zeros)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return False
        if not isinstance(made, Tensor):
            return False
        return not made.any()

    def module(self, node: Node) -> Any:
        """The module that a node calls; None if it does not call one."""
        return module_of(self.graph, node)

    def called(self, node: Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What a node computes for these arguments."""
        if node.op == "call_method":
            tensor, *rest = args
            method = getattr(tensor, str(node.target))
            return method(*rest, **kwargs)
        function = node.target
        if node.op == "call_module":
            function = self.module(node)
        assert callable(function)
        return function(*args, **kwargs)


def by_place(unit_map: Tensor, axes: frozenset[int]) -> Tensor:
    """The units of a map at each place along `axes`: (places, others)."""
    places = 1
    others = []
    for axis, size in enumerate(unit_map.shape):
        if axis in axes:
            places *= size
        else:
            others.append(axis)
    in_front = unit_map.permute(*sorted(axes), *others)
    return in_front.reshape(places, -1)


def _get(graph: GraphModule, name: str) -> Tensor:
    parent, _, leaf = name.rpartition(".")
    owner: nn.Module = graph
    if parent:
        owner = submodule(graph, parent)
    tensor: Tensor = getattr(owner, leaf)
    return tensor
