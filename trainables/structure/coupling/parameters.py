"""What a layer does to units by its parameters: which it reads, and which it writes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from slimfront.trainables.structure.coupling.known import Known, along, compressed, varying
from slimfront.trainables.structure.coupling.walk import Call, Walk


@dataclass(frozen=True)
class CalledLayer:
    """A layer that a node calls, and the walk that is told of its units."""

    walk: Walk
    node: Node
    name: str
    module: Any

    @property
    def why_all_stay(self) -> str:
        """Why units stay that it reads in a way in which none can go."""
        return f"'{self.name}' needs all of them"

    def split(self, known: Known, axis: int) -> tuple[Tensor | None, Known]:
        """The units along an axis (size,), None if there are none; and the tensor with its other
        unit maps."""
        rest = known.without_units(axis)
        found = known.along(axis)
        if not found:
            return None, rest
        unit_map = found[0]
        axes = varying(unit_map)
        if len(axes) > 1:  # each place along the other axes reads by the same weights
            self.walk.units.keep(unit_map, self.why_all_stay)
            return None, rest
        return unit_map.reshape(-1), rest

    def without_positions(self, known: Known, channels: int) -> Known:
        """A tensor whose units go as a whole along the axes behind that of the `channels`."""
        positions = range(channels + 1, known.dim)
        return Known(
            shape=known.shape,
            unit_maps=self.walk.left_of(
                known.unit_maps,
                axes=positions,
                why=self.why_all_stay,
            ),
            zero=known.zero,
        )

    def reads(self, units: Tensor | None, axis: int, harmless: Tensor | None = None) -> None:
        """Notes that the weight reads units along an axis of it, which may go where that is
        `harmless`; None: where they may go was noted already."""
        if units is not None and harmless is not None:
            self.walk.units.read(units, harmless)
        name = f"{self.name}.weight"
        self.walk.tensor(
            name,
            axis=axis,
            units=units,
            reads=True,
        )

    def writes(self, axis: int = 0) -> Tensor | None:
        """Notes the units that the weight makes along an axis, and the bias with it: those of an
        earlier call, or new ones."""
        name = f"{self.name}.weight"
        units = self.walk.units_of(name, axis)
        size = self.module.weight.shape[axis]
        if units is None and size > 1:
            units = self.walk.units.fresh(size)
        self.walk.tensor(name, axis, units)
        self.note(units, "bias")
        return units

    def note(self, units: Tensor | None, *leaves: str) -> None:
        """Notes the units along the first axis of those of these parameters that there are."""
        for leaf in leaves:
            tensor = getattr(self.module, leaf, None)
            if tensor is not None:
                name = f"{self.name}.{leaf}"
                self.walk.tensor(name, 0, units)

    def keep_all(self, read: Tensor | None = None) -> None:
        """Has all of it stay, and the units that it reads."""
        walk = self.walk
        if read is not None:
            walk.units.keep(read, self.why_all_stay)
        walk.keep_parameters(self.module, self.name)

    def has_no_bias(self) -> Tensor:
        """Where it has no bias, or one of 0: (out,)."""
        bias = self.module.bias
        if bias is None:
            return torch.ones((), dtype=torch.bool)
        found: Tensor = bias == 0
        return found

    def output(self, rest: Known, axis: int, written: Tensor | None, zero: Tensor) -> Any:
        """What it makes: the units that it writes along an axis, where they are `zero`, and those
        of the other axes."""
        shape = self.walk.shape_of(self.node)
        if shape is None:
            return NotImplemented
        dim = len(shape)
        unit_maps = list(rest.unit_maps)
        if written is not None:
            unit_maps.append(along(written, axis, dim))
        made = Known(
            shape=shape,
            unit_maps=self.walk.apart(unit_maps),
        )
        zeros = along(
            zero.expand(shape[axis]),
            axis=axis,
            dim=dim,
        )
        return made.with_zero(compressed(zeros))


def layer_of(walk: Walk, call: Call) -> CalledLayer:
    """The layer that a call calls."""
    return CalledLayer(
        walk,
        node=call.node,
        name=call.name,
        module=walk.module(call.node),
    )
