"""What units of a network cost, in parameters or in FLOPs, given which others are alive."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimfront.trainables.structure.channel_groups import UnitGroup
from slimfront.trainables.tasks.evaluating import evaluating

Currency = Literal["params", "flops"]
Alive = Mapping[str, Tensor]
"""Which units there are, (units,) bool, by the name of their group."""

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class _Axis:
    """The entries along one axis of a parameter: which unit of a group each is of, (entries,); −1:
    none."""

    group: str
    owners: Tensor

    def alive(self, alive: Alive) -> Tensor:
        """Which entries there are: all but those of units that are gone, (entries,) bool."""
        of_owners = alive[self.group][self.owners.clamp(min=0)]
        return of_owners | (self.owners < 0)

    def per_unit(self, of_entry: float, units: int) -> Tensor:
        """What the entries of each unit cost, (units,), where each entry costs as much."""
        mine = self.owners[self.owners >= 0]
        return torch.bincount(mine, minlength=units).double() * of_entry


@dataclass
class _Priced:
    """A parameter whose every number costs `price`, and the groups that its axes belong to, by the
    number of the axis."""

    shape: torch.Size
    price: float
    axes: dict[int, list[_Axis]] = field(default_factory=dict)

    def entries(self, axis: int, alive: Alive) -> int:
        """How many entries there are along an axis."""
        there = torch.ones(self.shape[axis], dtype=torch.bool)
        for part in self.axes.get(axis, ()):
            there &= part.alive(alive)
        return int(there.sum())

    def cost(self, alive: Alive, without: int | None = None) -> float:
        """What is there of it costs; `without` an axis, each entry along that."""
        cost = self.price
        for axis in range(len(self.shape)):
            if axis != without:
                cost *= self.entries(axis, alive)
        return cost


class UnitCosts:
    """The costs of the units of some groups, and of the network that they are in.

    A unit costs the entries of the parameters that make it and of those that read it, as far as
    what is at their other end is alive: two units that meet in a convolution each cost less once
    the other is gone. In FLOPs an entry costs as often as it is used for one input; biases, norms
    and embeddings cost nothing.
    """

    def __init__(
        self, network: nn.Module, groups: Sequence[UnitGroup], inputs: Tensor, currency: Currency
    ) -> None:
        self.groups = groups
        uses: dict[str, float] = {}
        if currency == "flops":
            uses = _uses(network, inputs)
        self.parameters: dict[str, _Priced] = {}
        for name, parameter in network.named_parameters():
            price = 1.0
            if currency == "flops":
                price = uses.get(name, 0.0)
            self.parameters[name] = _Priced(parameter.shape, price)
        for group in groups:
            for name, owners in group.writers.items():
                self._note(group.name, name, group.axes.get(name, 0), owners)
            for name, owners in group.readers.items():
                self._note(group.name, name, group.read_axes[name], owners)
        everything = {g.name: torch.ones(g.units, dtype=torch.bool) for g in groups}
        self.whole = self.total(everything)
        """That of the network with all units."""

    def _note(self, group: str, name: str, axis: int, owners: Tensor) -> None:
        parts = self.parameters[name].axes.setdefault(axis, [])
        parts.append(_Axis(group, owners.cpu()))

    def total(self, alive: Alive) -> float:
        """What the network costs with these units."""
        return sum(parameter.cost(alive) for parameter in self.parameters.values())

    def of_units(self, alive: Alive) -> dict[str, Tensor]:
        """What each unit costs beside these others, (units,) by the name of the group."""
        costs = {group.name: torch.zeros(group.units, dtype=torch.float64) for group in self.groups}
        for parameter in self.parameters.values():
            for axis, parts in parameter.axes.items():
                of_entry = parameter.cost(alive, without=axis)
                for part in parts:
                    units = len(costs[part.group])
                    costs[part.group] += part.per_unit(of_entry, units)
        return costs

    def least(self) -> float:
        """What the network costs with one unit of each group."""
        alive = {}
        for group in self.groups:
            alive[group.name] = torch.arange(group.units) == 0
        return self.total(alive)


def _uses(network: nn.Module, inputs: Tensor) -> dict[str, float]:
    """How often each entry of a layer's weight is used for one input, by the parameter's name."""
    uses: dict[str, float] = {}
    handles = []
    for name, module in network.named_modules():
        weights = _weights(module, f"{name}." if name else "")
        if not weights:
            continue

        def count(
            layer: nn.Module,
            arguments: tuple[Any, ...],
            outputs: Any,
            weights: list[str] = weights,
        ) -> None:
            for weight in weights:
                uses[weight] = uses.get(weight, 0.0) + _positions(layer, arguments, outputs)

        handles.append(module.register_forward_hook(count))
    try:
        with evaluating(network), torch.no_grad():
            network(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: count / len(inputs) for name, count in uses.items()}


def _weights(module: nn.Module, prefix: str) -> list[str]:
    """The names of the matrices that a layer multiplies with when it is called."""
    if isinstance(module, nn.MultiheadAttention):
        own = [name for name, parameter in module.named_parameters() if parameter.dim() > 1]
        return [prefix + name for name in own]
    if isinstance(module, nn.RNNBase):
        return [prefix + name for name, _ in module.named_parameters() if "weight" in name]
    if isinstance(module, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)):
        return [f"{prefix}weight"]
    return []


def _positions(layer: nn.Module, arguments: tuple[Any, ...], outputs: Any) -> float:
    """How often a layer used its weight in one call, of all inputs of a batch together."""
    if isinstance(layer, nn.MultiheadAttention):
        used, width = arguments[0], layer.embed_dim
    elif isinstance(layer, nn.RNNBase):
        used, width = arguments[0], layer.input_size
    elif isinstance(layer, _TRANSPOSED):
        used, width = arguments[0], layer.in_channels
    elif isinstance(layer, _CONVOLUTIONS):
        used, width = outputs, layer.out_channels
    else:
        assert isinstance(layer, nn.Linear)
        used, width = outputs, layer.out_features
    return float(used.numel() / width)


def worth_least(
    scores: Mapping[str, Tensor], costs: UnitCosts, alive: Alive, allowed: float
) -> dict[str, Tensor]:
    """The units that stay, (units,) bool by the name of their group, where so many go that the
    network costs at most `allowed`, those first that are worth least for what they cost.

    That is the greedy rule for a knapsack. Of each group the best unit stays, so that the network
    may cost more all the same. What two units cost together is less than what each costs, so that
    none goes too early: units go until the sum of their costs is enough, and then the rest is
    looked at again.

    Args:
        scores: what each unit is worth, (units,) by the name of its group.
        alive: the units that there are.
    """
    stay = {name: units.clone() for name, units in alive.items()}
    names = list(stay)
    while True:
        excess = costs.total(stay) - allowed
        if excess <= 0:
            return stay
        prices = costs.of_units(stay)
        worth = [_worth(scores[name].cpu().double(), prices[name], stay[name]) for name in names]
        order = torch.cat(worth).argsort()
        may_go = int(torch.isfinite(torch.cat(worth)).sum())
        if not may_go:
            return stay
        saved = torch.cat([prices[name] for name in names])[order].cumsum(0)
        enough = int((saved < excess).sum()) + 1
        gone = torch.zeros(len(order), dtype=torch.bool)
        gone[order[: min(enough, may_go)]] = True
        for name, part in zip(names, gone.split([len(stay[n]) for n in names]), strict=True):
            stay[name] &= ~part


def _worth(scores: Tensor, prices: Tensor, alive: Tensor) -> Tensor:
    """What the units of a group are worth for what they cost; infinite for those that cannot go:
    those that are gone, and the best that is left.

    The root of the costs does better than the costs: see docs/shipping.md.
    """
    there = torch.where(alive, scores, -torch.inf)
    worth = scores / prices.clamp_min(torch.finfo(prices.dtype).tiny).sqrt()
    worth[~alive] = torch.inf
    worth[there.argmax()] = torch.inf
    return worth
