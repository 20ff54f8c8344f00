"""What units of a network cost, in parameters or in FLOPs, given which others are alive."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimfront.trainables.errors import UserError
from slimfront.trainables.sparsifiers.use.products import uses_in_products
from slimfront.trainables.structure.channel_groups import UnitGroup
from slimfront.trainables.structure.graph import ancestors, module_of, tensor_at
from slimfront.trainables.structure.tracing.trace import trace
from slimfront.trainables.tasks.evaluating import evaluating

Currency = Literal["params", "flops"]
Tensors = dict[str, Tensor]
"""Numbers of units, (units,), by the name of their group."""
Alive = Mapping[str, Tensor]
"""Which units there are, (units,) bool, by the name of their group."""
Arguments = tuple[Any, ...]
"""What a layer is called with."""

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WITH_WEIGHT = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)
"""Layers whose one matrix is `weight`."""


@dataclass(frozen=True)
class _Axis:
    """The entries along one axis of a parameter: which unit of a group each is of, (entries,); −1:
    none."""

    group: str
    owners: Tensor

    def is_same(self, other: "_Axis") -> bool:
        """Whether both say the same."""
        return self.group == other.group and torch.equal(self.owners, other.owners)

    def alive(self, alive: Alive) -> Tensor:
        """Which entries there are: all but those of units that are gone, (entries,) bool."""
        units = alive[self.group]
        owners = self.owners.clamp(min=0)
        of_owners = units[owners]
        of_none = self.owners < 0
        return of_owners | of_none

    def per_unit(self, of_entry: float, units: int) -> Tensor:
        """What the entries of each unit cost, (units,), where each entry costs as much."""
        owned = self.owners >= 0
        owners = self.owners[owned]
        counts = torch.bincount(owners, minlength=units)
        entries = counts.double()
        return entries * of_entry


@dataclass
class _Priced:
    """A parameter whose every number costs `price`, and the groups that its axes belong to, by the
    number of the axis."""

    shape: torch.Size
    price: float
    is_read: bool = True
    axes: dict[int, list[_Axis]] = field(default_factory=dict)

    def note(self, axis: int, of_group: _Axis) -> None:
        """Has entries along an axis belong to a group."""
        groups = self.axes.setdefault(axis, [])
        if not any(of_group.is_same(other) for other in groups):  # by another name
            groups.append(of_group)

    def entries(self, axis: int, alive: Alive) -> int:
        """How many entries there are along an axis."""
        parts = self.axes.get(axis, ())
        length = self.shape[axis]
        there = torch.ones(length, dtype=torch.bool)
        for part in parts:
            there &= part.alive(alive)
        count = there.sum()
        return int(count)

    def count(self, alive: Alive) -> int:
        """How many numbers are there of it."""
        return math.prod(self.entries(axis, alive) for axis in range(len(self.shape)))

    def cost(self, alive: Alive, without: int | None = None) -> float:
        """What is there of it costs; `without` an axis, each entry along that."""
        cost = self.price
        for axis in range(len(self.shape)):
            if axis == without:
                continue
            entries = self.entries(axis, alive)
            cost *= entries
        return cost


class UnitCosts:
    """The costs of the units of some groups, and of the network that they are in.

    A unit costs the entries of the parameters that make it and of those that read it, as far as
    what is at their other end is alive: two units that meet in a convolution each cost less once
    the other is gone. In FLOPs an entry costs as often as it is used for one input; biases, norms
    and embeddings cost nothing. What is read in training mode alone, as an auxiliary head is, or
    never, costs nothing either: it goes in any case.
    """

    def __init__(
        self, network: nn.Module, groups: Sequence[UnitGroup], inputs: Tensor, currency: Currency
    ) -> None:
        self.groups = groups
        uses: dict[str, float] = {}
        if currency == "flops":
            uses = uses_of_weights(network, inputs)
        unread = _never_read(network, inputs)
        self.parameters: dict[str, _Priced] = {}
        priced: dict[Tensor, _Priced] = {}
        for name, parameter in network.named_parameters(remove_duplicate=False):
            if parameter not in priced:
                price = 1.0
                if currency == "flops":
                    price = uses.get(name, 0.0)
                elif id(parameter) in unread:
                    price = 0.0
                priced[parameter] = _Priced(
                    parameter.shape, price, is_read=id(parameter) not in unread
                )
            self.parameters[name] = priced[parameter]
        self.unique = list(priced.values())
        """The same, a parameter of several names once."""
        everything = {}
        for group in groups:
            self._note_axes(group)
            everything[group.name] = torch.ones(group.units, dtype=torch.bool)
        self.whole = self.total(everything)
        """That of the network with all units."""

    def _note_axes(self, group: UnitGroup) -> None:
        """Writes down along which axes of which parameters the entries are a group's."""
        for name, owners in group.writers.items():
            axis = group.axes.get(name, 0)
            self._note(name, axis, group, owners)
        for name, owners in group.readers.items():
            axis = group.read_axes[name]
            self._note(name, axis, group, owners)

    def _note(self, name: str, axis: int, group: UnitGroup, owners: Tensor) -> None:
        """The same along one axis of the parameter `name`."""
        on_cpu = owners.cpu()
        of_group = _Axis(group.name, on_cpu)
        parameter = self.parameters[name]
        parameter.note(axis, of_group)

    def total(self, alive: Alive) -> float:
        """What the network costs with these units."""
        costs = [parameter.cost(alive) for parameter in self.unique]
        return sum(costs)

    def entries(self, alive: Alive) -> int:
        """How many numbers its parameters have with these units, but for what is never read."""
        return sum(parameter.count(alive) for parameter in self.unique if parameter.is_read)

    def of_units(self, alive: Alive) -> Tensors:
        """What each unit costs beside these others, (units,) by the name of the group."""
        costs = {}
        for group in self.groups:
            costs[group.name] = torch.zeros(group.units, dtype=torch.float64)
        for parameter in self.unique:
            for axis, parts in parameter.axes.items():
                of_entry = parameter.cost(alive, without=axis)
                for part in parts:
                    of_group = costs[part.group]
                    units = len(of_group)
                    of_group += part.per_unit(of_entry, units)
        return costs

    def least(self) -> float:
        """What the network costs with one unit of each group."""
        return self.total(self._one_of_each())

    def staying(self) -> dict[str, float]:
        """What each layer costs with one unit of each group, as a share of the whole network, the
        most costly first; by the name of the layer, or of the parameter that is in none."""
        alive = self._one_of_each()
        shares: dict[str, float] = {}
        seen: set[int] = set()
        for name, parameter in self.parameters.items():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            layer = name.rpartition(".")[0] or name
            shares[layer] = shares.get(layer, 0.0) + parameter.cost(alive) / self.whole
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def _one_of_each(self) -> Alive:
        alive = {}
        for group in self.groups:
            units = torch.arange(group.units)
            alive[group.name] = units == 0
        return alive


def _never_read(network: nn.Module, inputs: Tensor) -> set[int]:
    """The parameters, by `id`, that no output depends on in evaluation mode; none where that is not
    known, of a network that cannot be traced."""
    try:
        with evaluating(network):
            graph = trace(network, inputs)
    except UserError:
        return set()
    read: set[int] = set()
    (output,) = [node for node in graph.graph.nodes if node.op == "output"]
    for node in ancestors(output):
        if node.op == "get_attr":
            read.add(id(tensor_at(graph, str(node.target))))
        module = module_of(graph, node)
        if module is not None:
            read.update(id(parameter) for parameter in module.parameters())
    return {id(parameter) for parameter in network.parameters() if id(parameter) not in read}


def uses_of_weights(network: nn.Module, inputs: Tensor) -> dict[str, float]:
    """How often each entry of a layer's weight is used for one input, by the parameter's name."""
    # A weight that several layers share has the name of its first one.
    names: dict[Tensor, str] = {}
    for name, parameter in network.named_parameters():
        names[parameter] = name
    counter = _Counter()
    handles = []
    for module in network.modules():
        weights = [names[weight] for weight in _weights(module) if weight in names]
        if not weights:
            continue
        counter.weights[module] = weights
        handle = module.register_forward_hook(counter)
        handles.append(handle)
    try:
        with evaluating(network), torch.no_grad():
            network(inputs.clone())
    finally:
        for handle in handles:
            handle.remove()
    examples = len(inputs)
    uses = {}
    for name, count in counter.uses.items():
        uses[name] = count / examples
    others = {
        name: parameter
        for parameter, name in names.items()
        if parameter.dim() > 1 and name not in uses
    }
    return uses | uses_in_products(network, inputs, others)


@dataclass
class _Counter:
    """A hook that counts, by the parameter's name, how often layers use their `weights`."""

    weights: dict[nn.Module, list[str]] = field(default_factory=dict)
    uses: dict[str, float] = field(default_factory=dict)

    def __call__(self, layer: nn.Module, arguments: Arguments, outputs: Any) -> None:
        positions = _positions(layer, arguments, outputs)
        weights = self.weights[layer]
        for weight in weights:
            before = self.uses.get(weight, 0.0)
            self.uses[weight] = before + positions


def _weights(module: nn.Module) -> list[Tensor]:
    """The matrices that a layer multiplies with when it is called."""
    if isinstance(module, _WITH_WEIGHT):
        return [module.weight]
    found: list[Tensor] = []
    if isinstance(module, nn.MultiheadAttention):
        for parameter in module.parameters():
            if parameter.dim() > 1:
                found.append(parameter)
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        for name, parameter in module.named_parameters():
            if "weight" in name:
                found.append(parameter)
    return found


def _positions(layer: nn.Module, arguments: Arguments, outputs: Any) -> float:
    """How often a layer used its weight in one call, of all inputs of a batch together."""
    if isinstance(layer, _CONVOLUTIONS):
        used = outputs
        width = layer.out_channels
    elif isinstance(layer, nn.Linear):
        used = outputs
        width = layer.out_features
    else:
        used = arguments[0]
        width = _input_width(layer)
    return float(used.numel() / width)


def _input_width(layer: nn.Module) -> int:
    """How many numbers a layer, which uses its weight for each position of its inputs, reads
    there."""
    if isinstance(layer, nn.MultiheadAttention):
        return int(layer.embed_dim)
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
        return layer.input_size
    assert isinstance(layer, _TRANSPOSED)
    return layer.in_channels


def worth_least(
    scores: Mapping[str, Tensor], costs: UnitCosts, alive: Alive, allowed: float
) -> Tensors:
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
    units = [len(of_group) for of_group in stay.values()]
    while True:
        excess = costs.total(stay) - allowed
        if excess <= 0:
            return stay
        costs_of_units = costs.of_units(stay)
        worth = []
        prices = []
        for name, there in stay.items():
            own_scores = scores[name].cpu()
            own_prices = costs_of_units[name]
            own_worth = _worth(own_scores.double(), own_prices, there)
            prices.append(own_prices)
            worth.append(own_worth)
        all_worth = torch.cat(worth)
        all_prices = torch.cat(prices)
        going = _going(all_worth, all_prices, excess)
        if not going.any():
            return stay
        parts = going.split(units)
        for name, part in zip(stay, parts, strict=True):
            stay[name] &= ~part


def _going(worth: Tensor, prices: Tensor, excess: float) -> Tensor:
    """Which units go, (units,) bool, so that their `prices` together are at least `excess`: those
    that are worth least. None of infinite worth goes."""
    finite = torch.isfinite(worth)
    may_go = int(finite.sum())
    order = worth.argsort()
    in_order = prices[order]
    saved = in_order.cumsum(0)
    too_little = saved < excess
    enough = int(too_little.sum()) + 1
    count = min(enough, may_go)
    first = order[:count]
    units = len(worth)
    going = torch.zeros(units, dtype=torch.bool)
    going[first] = True
    return going


def _worth(scores: Tensor, prices: Tensor, alive: Tensor) -> Tensor:
    """What the units of a group are worth for what they cost; infinite for those that cannot go:
    those that are gone, and the best that is left.

    The root of the costs does better than the costs: see docs/shipping.md.
    """
    limits = torch.finfo(prices.dtype)
    positive = prices.clamp_min(limits.tiny)
    worth = scores / positive.sqrt()
    gone = ~alive
    worth[gone] = torch.inf
    there = torch.where(alive, scores, -torch.inf)
    best = there.argmax()
    worth[best] = torch.inf
    return worth
