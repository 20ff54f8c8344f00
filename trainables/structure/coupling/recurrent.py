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
    if len(call.args) > 1 or call.kwargs or module.proj_size:
        layer.keep_all()
        return NotImplemented
    known = call.input
    read, rest = layer.split(known, known.last_axis)
    zero = known.zero_along(known.last_axis)
    states: list[Tensor] = []
    for number in range(module.num_layers):
        written = []
        zeros = []
        for weights in _directions(layer, number):
            units = weights.units()
            written.append(units)
            zeros.append(weights.zero(units, read, zero))
        states += written
        read = torch.cat(written)
        zero = torch.cat(zeros)
    assert read is not None
    walk.units.pack(torch.stack(states))
    made, ends = walk.made[call.node]
    last = made.last_axis
    own = along(read, last, made.dim)
    out = Known(made.shape, walk.apart([*rest.unit_maps, own]))
    zero_out = along(zero, last, made.dim)
    return out.with_zero(compressed(zero_out)), _ends(ends, states, made.dim)


def _ends(ends: Any, states: list[Tensor], dim: int) -> Any:
    """The states at the end, (layers · ways, N, hidden), without N for one input."""
    unit_map = torch.stack(states)
    if dim == 3:
        unit_map = unit_map.unsqueeze(1)
    return mapped_known(ends, lambda end: Known(end.shape, (unit_map,)))


@dataclass(frozen=True)
class _Weights:
    """The parameters of one layer of a recurrent one in one direction: `ending` is how their names
    end."""

    layer: CalledLayer
    ending: str

    @property
    def gates(self) -> int:
        """How many rows each hidden unit has."""
        return _GATES.get(self.layer.module.mode, 1)

    def tensor(self, leaf: str) -> Tensor:
        """A parameter."""
        found: Tensor = getattr(self.layer.module, leaf + self.ending)
        return found

    def name(self, leaf: str) -> str:
        """The name of a parameter in the network."""
        return f"{self.layer.name}.{leaf}{self.ending}"

    def units(self) -> Tensor:
        """The hidden units: those of an earlier call, or new ones."""
        walk = self.layer.walk
        known = walk.units_of(self.name("weight_hh_"), 1)
        if known is not None:
            return known
        return walk.units.fresh(self.layer.module.hidden_size)

    def zero(self, own: Tensor, read: Tensor | None, zero_in: Tensor) -> Tensor:
        """Notes the units of the parameters, and what they read; which of its `own` units are
        0."""
        walk = self.layer.walk
        inward = self.tensor("weight_ih_")
        across = self.tensor("weight_hh_")
        if read is not None:
            walk.units.read(read, zero_in | ~inward.any(0))
        fed = inward[:, ~zero_in].any(1) | across.any(1)
        of_gates = own.repeat(self.gates)
        if self.layer.module.bias:
            for leaf in ("bias_ih_", "bias_hh_"):
                fed = fed | (self.tensor(leaf) != 0)
                walk.tensor(self.name(leaf), 0, of_gates)
        of_each_gate = fed.reshape(self.gates, -1)
        zero = ~of_each_gate.any(0)
        walk.units.read(own, zero | ~across.any(0))
        walk.tensor(self.name("weight_ih_"), 0, of_gates)
        walk.tensor(self.name("weight_ih_"), 1, read, reads=True)
        walk.tensor(self.name("weight_hh_"), 0, of_gates)
        walk.tensor(self.name("weight_hh_"), 1, own, reads=True)
        return zero


def _directions(layer: CalledLayer, number: int) -> list[_Weights]:
    """The parameters of one of the layers, of each direction."""
    found = [_Weights(layer, f"l{number}")]
    if layer.module.bidirectional:
        found.append(_Weights(layer, f"l{number}_reverse"))
    return found


MODULES: dict[type[nn.Module], Handler] = dict.fromkeys((nn.RNN, nn.GRU, nn.LSTM), recurrent)
