"""Recurrent layers: a hidden unit stands for rows of each gate, and goes in all of them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimfront.trainables.structure.coupling.known import Known, along, compressed, mapped_known
from slimfront.trainables.structure.coupling.parameters import CalledLayer, layer_of
from slimfront.trainables.structure.coupling.walk import Call, Handler, Walk

_GATES = {"LSTM": 4, "GRU": 3}
"""How many gates there are, where there is more than one."""


def recurrent(walk: Walk, call: Call) -> Any:
    """RNN, GRU and LSTM from a state of 0: a hidden unit whose gates have neither weights nor
    biases is 0 all along."""
    layer = layer_of(walk, call)
    module = layer.module
    has_state = len(call.args) > 1 or bool(call.kwargs)
    if has_state or module.proj_size:
        layer.keep_all()
        return NotImplemented
    known = call.input
    last = known.last_axis
    read, rest = layer.split(known, last)
    zero = known.zero_along(last)
    states: list[Tensor] = []
    for number in range(module.num_layers):
        written = []
        zeros = []
        for weights in _directions(layer, number):
            units = weights.units()
            zero_of_units = weights.zero(units, read, zero)
            written.append(units)
            zeros.append(zero_of_units)
        states += written
        read = torch.cat(written)
        zero = torch.cat(zeros)
    assert read is not None
    by_layer = torch.stack(states)
    walk.units.pack(by_layer)
    made, ends = walk.made[call.node]
    last = made.last_axis
    own = along(read, last, made.dim)
    out = Known(
        shape=made.shape,
        unit_maps=walk.apart([*rest.unit_maps, own]),
    )
    zero_out = along(zero, last, made.dim)
    if made.dim == 3:
        by_layer = by_layer.unsqueeze(1)  # (layers · ways, N, hidden)

    def end_known(end: Known) -> Known:
        return Known(end.shape, (by_layer,))

    out = out.with_zero(compressed(zero_out))
    return out, mapped_known(ends, end_known)


@dataclass(frozen=True)
class _Weights:
    """The parameters of one layer of a recurrent one in one direction: `ending` is how their names
    end."""

    layer: CalledLayer
    ending: str

    @property
    def gates(self) -> int:
        """How many rows each hidden unit has."""
        mode = self.layer.module.mode
        return _GATES.get(mode, 1)

    def tensor(self, leaf: str) -> Tensor:
        """A parameter."""
        name = leaf + self.ending
        module = self.layer.module
        found: Tensor = getattr(module, name)
        return found

    def name(self, leaf: str) -> str:
        """The name of a parameter in the network."""
        return f"{self.layer.name}.{leaf}{self.ending}"

    def units(self) -> Tensor:
        """The hidden units: those of an earlier call, or new ones."""
        walk = self.layer.walk
        name = self.name("weight_hh_")
        known = walk.units_of(name, 1)
        if known is not None:
            return known
        size = self.layer.module.hidden_size
        return walk.units.fresh(size)

    def zero(self, own: Tensor, read: Tensor | None, zero_in: Tensor) -> Tensor:
        """Notes the units of the parameters, and what they read; which of its `own` units are
        0."""
        units = self.layer.walk.units
        inward = self.tensor("weight_ih_")
        across = self.tensor("weight_hh_")
        if read is not None:
            unused = ~inward.any(0)
            units.read(read, harmless=zero_in | unused)
        if self.layer.module.bias:
            self._note_rows("bias_ih_", own)
            self._note_rows("bias_hh_", own)
        feeding = inward[:, ~zero_in]
        fed = self._fed(feeding, across)
        of_each_gate = fed.reshape(self.gates, -1)
        zero = ~of_each_gate.any(0)
        unread = ~across.any(0)
        units.read(own, harmless=zero | unread)
        self._note_rows("weight_ih_", own)
        self._note_columns("weight_ih_", read)
        self._note_rows("weight_hh_", own)
        self._note_columns("weight_hh_", own)
        return zero

    def _fed(self, inward: Tensor, across: Tensor) -> Tensor:
        """Which rows of gates have a weight or bias that is not 0."""
        from_below = inward.any(1)
        fed = from_below | across.any(1)
        if not self.layer.module.bias:
            return fed
        for leaf in ("bias_ih_", "bias_hh_"):
            bias = self.tensor(leaf)
            fed = fed | (bias != 0)
        return fed

    def _note_rows(self, leaf: str, own: Tensor) -> None:
        """Notes that each gate has a row of each unit."""
        rows = own.repeat(self.gates)
        walk = self.layer.walk
        walk.tensor(
            self.name(leaf),
            axis=0,
            units=rows,
        )

    def _note_columns(self, leaf: str, read: Tensor | None) -> None:
        walk = self.layer.walk
        walk.tensor(
            self.name(leaf),
            axis=1,
            units=read,
            reads=True,
        )


def _directions(layer: CalledLayer, number: int) -> list[_Weights]:
    """The parameters of one of the layers, of each direction."""
    endings = [f"l{number}"]
    if layer.module.bidirectional:
        endings.append(f"l{number}_reverse")
    return [_Weights(layer, ending) for ending in endings]


MODULES: dict[type[nn.Module], Handler] = dict.fromkeys((nn.RNN, nn.GRU, nn.LSTM), recurrent)
