"""Recurrent layers and their cells: a hidden unit stands for rows of each gate, and goes in all of
them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimfront.trainables.structure.coupling.known import (
    Known,
    along,
    compressed,
    found_in,
    mapped_known,
)
from slimfront.trainables.structure.coupling.parameters import CalledLayer, layer_of
from slimfront.trainables.structure.coupling.walk import Call, Handler, Walk


def recurrent(walk: Walk, call: Call) -> Any:
    """RNN, GRU and LSTM: a hidden unit that starts from 0 and whose gates have neither weights nor
    biases is 0 all along."""
    layer = layer_of(walk, call)
    module = layer.module
    given = call.named("input", "hx")
    starts = list(found_in(given.get("hx")))
    if module.proj_size:
        layer.keep_all()
        return NotImplemented
    known = given["input"]
    last = known.last_axis
    read, rest = layer.split(known, last)
    zero = known.zero_along(last)
    started = _zero_starts(starts, module.hidden_size)
    states: list[Tensor] = []
    for number in range(module.num_layers):
        written = []
        zeros = []
        for weights in _directions(layer, number):
            units = weights.units()
            zero_of_units = weights.always_zero(zero, started)
            weights.note(units, read, zero, zero_of_units)
            written.append(units)
            zeros.append(zero_of_units)
        states += written
        read = torch.cat(written)
        zero = torch.cat(zeros)
    assert read is not None
    by_layer = torch.stack(states)
    walk.units.pack_rows(by_layer)
    for start in starts:
        _start_with(walk, start, by_layer)
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


def _zero_starts(starts: Sequence[Known], hidden: int) -> Tensor:
    """Which hidden units start from 0 in all states that are given: (hidden,)."""
    zero = torch.ones(hidden, dtype=torch.bool)
    for start in starts:
        zero = zero & start.zero_along(start.last_axis)
    return zero


def _start_with(walk: Walk, start: Known, by_layer: Tensor) -> None:
    """Has a state that is given keep as many units as the layers do, by_layer (layers · ways,
    hidden): where it is 0, any; else those of the one layer."""
    last = start.last_axis
    rest = start.without_units(last)
    walk.stay(rest, "a state has one for each layer")
    found = start.along(last)
    if not found:
        walk.units.keep(by_layer, "it starts from a state that has no units")
        return
    (units,) = found
    if units.numel() != by_layer.shape[1]:
        walk.units.keep(units, "states differ by more than units")
        walk.units.keep(by_layer, "it starts from a state that differs by more than units")
        return
    row = units.reshape(1, -1)
    layers, _ = by_layer.shape
    if layers == 1:
        walk.units.tie(row, by_layer)
        return
    if not start.zero_along(last).all():
        walk.units.keep(units, "several layers start from it")
        walk.units.keep(by_layer, "they start from one state")
        return
    walk.units.pack_rows(torch.cat([row, by_layer]))


def cell(walk: Walk, call: Call) -> Any:
    """One step of an RNN, a GRU or an LSTM: (N, in) and states (N, hidden) to states. A hidden unit
    without weights or biases that was 0 is 0 again."""
    layer = layer_of(walk, call)
    given = call.named("input", "hx")
    known = given["input"]
    states = list(found_in(given.get("hx")))
    read, _ = layer.split(known, known.last_axis)
    weights = _Weights(layer, ending="")
    own = weights.units()
    before = _zero_starts(states, layer.module.hidden_size)
    zero_in = known.zero_along(known.last_axis)
    zero = weights.zero_after(zero_in, before)
    weights.note(own, read, zero_in, before)
    for state in states:
        found = state.along(state.last_axis)
        if found:
            walk.units.tie(found[0].reshape(-1), own)
        else:
            walk.units.keep(own, "it starts from a state that has no units")

    def next_state(made: Known) -> Known:
        last = made.last_axis
        state = Known(made.shape, (along(own, last, made.dim),))
        return state.with_zero(compressed(along(zero, last, made.dim)))

    return mapped_known(walk.made[call.node], next_state)


@dataclass(frozen=True)
class _Weights:
    """The parameters of one layer of a recurrent one in one direction: `ending` is how their names
    end."""

    layer: CalledLayer
    ending: str

    @property
    def gates(self) -> int:
        """How many rows each hidden unit has."""
        rows = len(self.tensor("weight_hh"))
        size: int = self.layer.module.hidden_size
        return rows // size

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
        name = self.name("weight_hh")
        known = walk.units_of(name, 1)
        if known is not None:
            return known
        size = self.layer.module.hidden_size
        return walk.units.fresh(size)

    def always_zero(self, zero_in: Tensor, started: Tensor) -> Tensor:
        """Which units are 0 at each step, of those that `started` from 0: they read nothing but
        inputs that are 0 and each other."""
        zero = started
        while True:
            left = self.zero_after(zero_in, zero)
            if torch.equal(left, zero):
                return zero
            zero = left

    def zero_after(self, zero_in: Tensor, before: Tensor) -> Tensor:
        """Which units are 0 after a step, of those that were 0 `before` it."""
        inward = self.tensor("weight_ih")
        across = self.tensor("weight_hh")
        fed = self._fed(inward[:, ~zero_in], across[:, ~before])
        of_each_gate = fed.reshape(self.gates, -1)
        return before & ~of_each_gate.any(0)

    def note(self, own: Tensor, read: Tensor | None, zero_in: Tensor, before: Tensor) -> None:
        """Notes the units of the parameters, and what they read: inputs, and their `own`, some of
        which are 0 `before`."""
        units = self.layer.walk.units
        if read is not None:
            unused = ~self.tensor("weight_ih").any(0)
            units.read(read, harmless=zero_in | unused)
        unread = ~self.tensor("weight_hh").any(0)
        units.read(own, harmless=before | unread)
        if self.layer.module.bias:
            self._note_rows("bias_ih", own)
            self._note_rows("bias_hh", own)
        self._note_rows("weight_ih", own)
        self._note_columns("weight_ih", read)
        self._note_rows("weight_hh", own)
        self._note_columns("weight_hh", own)

    def _fed(self, inward: Tensor, across: Tensor) -> Tensor:
        """Which rows of gates have a weight or bias that is not 0."""
        from_below = inward.any(1)
        fed = from_below | across.any(1)
        if not self.layer.module.bias:
            return fed
        for leaf in ("bias_ih", "bias_hh"):
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
    endings = [f"_l{number}"]
    if layer.module.bidirectional:
        endings.append(f"_l{number}_reverse")
    return [_Weights(layer, ending) for ending in endings]


MODULES: dict[type[nn.Module], Handler] = {
    **dict.fromkeys((nn.RNN, nn.GRU, nn.LSTM), recurrent),
    **dict.fromkeys((nn.RNNCell, nn.GRUCell, nn.LSTMCell), cell),
}
